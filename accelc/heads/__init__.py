"""Draft heads: small networks on a model's last hidden states that guess the tokens behind the next one."""

"""The only module that touches private torch modules; works on torch 2.11 and 2.13."""

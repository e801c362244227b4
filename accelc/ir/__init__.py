"""The ground floor: Program, state and tree specifications, the op dialect, exactness and errors."""

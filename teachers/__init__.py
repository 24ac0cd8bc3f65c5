"""Teachers: one file, one kind, one function `build(*, ...) -> Teacher`."""

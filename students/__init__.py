"""Students: one file, one kind, one function `build(*, ...) -> Student`."""

"""Images and their table: manifest, readers, data set, sampler."""

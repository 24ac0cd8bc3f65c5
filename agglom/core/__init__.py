"""The pure core: tensors in, tensors out. Imports torch, einops and the standard library only."""

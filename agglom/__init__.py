"""agglom: agglomerate many frozen vision foundation models into one student, and prove it per patient group."""

__version__ = "0.1.0"

"""Methods that act around the sub-layers of denoisers, one file each."""

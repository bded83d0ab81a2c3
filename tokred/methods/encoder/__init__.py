"""Methods that act inside the blocks of encoders, one file each."""

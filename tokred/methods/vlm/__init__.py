"""Methods that choose visual tokens before or inside a language model, one file each."""

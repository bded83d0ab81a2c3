"""Methods that act between the routers and the experts of language models, one file each."""

"""Vision towers inside models with vision, where a method before the language model acts in them too."""

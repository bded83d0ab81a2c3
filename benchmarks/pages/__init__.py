"""Pages and plots of the documentation that are made from the tables of results."""

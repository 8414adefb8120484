"""What it takes to check an implementation of a port of your own; import the modules of this package."""

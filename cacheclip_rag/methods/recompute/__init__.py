"""Online: how the chosen rows are carried through the layers. One way a file."""

"""What methods do while a table trains: the protocols of phases and procedures, and their parts."""

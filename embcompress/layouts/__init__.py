"""Tables, codes and streams that several methods lay their ids out in, and which ids get rows."""

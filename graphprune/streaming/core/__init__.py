"""What a streamed run is made of, whatever the format of the graph."""

"""Plans: what to draft at each batch size, chosen from what it costs and brings on this machine."""

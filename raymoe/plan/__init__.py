"""What a run or a sweep will take, before it starts: memory, hours, money. `planner` puts them together."""

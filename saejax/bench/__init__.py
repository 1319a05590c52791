"""`saejax bench`: how fast this machine trains, reads and harvests. Every benchmark runs in a process of its own."""

"""Other engines that serve a checkpoint: what they take, how they are started and deployed."""

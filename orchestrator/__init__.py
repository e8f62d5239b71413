"""Who runs what, when: the controller, its two runtimes, and what people see of them."""

"""What a float32 graph holds that can be INT8: linear operators, nodes with INT8 operators on the CPU, and the gain."""

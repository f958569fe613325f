"""How fast the ops are, beside what users have today, on the same operand.

shapes       the FFN's shapes, and what a user writes to choose
operands     activations with the zeros of a trained model, made on the device
products     one sparse product in the forms that its contenders take, and its float32 oracle
timing       contenders measured in turns
torch_peers  dense cuBLAS and cuSPARSELt, through torch
cusparselt   the search for cuSPARSELt's fastest right algorithm
gemm         a bench: a generator of rows; so are sparsify, ffn and model
ffn_operands, ffn_parts   what ffn runs on, and what it is made of
captured, profile   FFNs of a trained model, and operands as active as those of a recorded run
traffic      what passes between devices in a program
clock        a bench: what a 2:4 product does to the dense work beside it
estimate     where 2:4's gain goes on many GPUs, by arithmetic
tune         the fastest schedule of our own kernel for each product
rows         flat rows and their JSON; table, figure and model_figure show them, with the ceilings
             of rates
"""

"""A server that knows nothing of rbee: llama.cpp on a port, in an interpreter of its own."""

import signal
import sys

import xllamacpp

p = xllamacpp.CommonParams()
p.model.path, p.port, p.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
p.n_ctx = p.n_parallel * int(sys.argv[4])
p.n_batch = p.n_ubatch = 128
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
if sys.argv[5:] == ["embed"]:
    p.embedding, p.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(p)
signal.pause()

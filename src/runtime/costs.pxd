# The cost model: how much work things are, when another thread pays, and how long a call may go without a look for
# Ctrl-C. All of it is counted in multiply-adds. No result depends on any of it.

cdef enum:
    # What an element takes beside the products it is in.
    CLIP_WORK = 4         # a sum of squares, or a scaling
    COPY_WORK = 8         # copied, or rotated by its position
    PASS_WORK = 8         # of an optimiser: memory is the limit, and counts for more than the arithmetic
    DROPOUT_WORK = 12
    TANH_WORK = 16
    NORM_WORK = 24
    WEIGHT_WORK = 32      # an attention weight
    GATE_WORK = 32        # a gate of a recurrent cell
    LOSS_WORK = 32        # an element of a loss other than cross-entropy
    ACTIVATION_WORK = 40  # an activation or a softmax, not in the store of a product
    SOFTMAX_WORK = 48     # a logit of a cross-entropy

    # Below these, another thread costs more than it gives.
    TEAM_WORK = 1 << 18   # all of a call: a thread has to wake
    STEP_WORK = 1 << 15   # of one thread between two barriers, a time step of a recurrent layer
    ATTENTION_WORK = 1 << 20  # of a call of `attention` over arrays
    BLOCK_WORK = 1 << 17  # of one thread in one step of a Transformer block of few rows

    # Between two looks for Ctrl-C.
    SIGNAL_WORK = 1 << 29         # in products of matrices: a tenth of a second at the worst
    SIGNAL_WORK_LANE = 1 << 26    # of each lane, in recurrent steps
    SIGNAL_WORK_SCALAR = 1 << 24  # where nothing is vectorised

    # Weights and where they come from.
    CORE_CACHE = 1 << 20  # bytes that surely stay in a core's own cache;
    READ_WORK = 12        # if they do not, to read a weight takes as long as so many multiply-adds


cdef inline int threads_for(Py_ssize_t items, double work_each, int n_threads) noexcept nogil:
    """How many threads some items pay for."""
    return <int> max(1, min(min(<double> n_threads, <double> items), items * work_each / TEAM_WORK))

"""Kernels that are compiled more than once: for each instruction set of a CPU, for each dtype and depth on a GPU."""

def cpu_kernels(name, srcs, hdrs, variants, variant_src, deps):
    """A library of kernels.

    Args:
      name: of the library.
      srcs: sources for the baseline instruction set: what chooses among the variants.
      hdrs: headers of all.
      variants: compiler flags of each variant.
      variant_src: a variant's source, with {} for its name.
      deps: what all of them need.
    """
    native.cc_library(
        name = name + "_headers",
        hdrs = hdrs,
        deps = deps,
    )
    for variant, flags in variants.items():
        native.cc_library(
            name = name + "_" + variant,
            srcs = [variant_src.format(variant)],
            copts = flags,
            deps = [":" + name + "_headers"],
            alwayslink = True,
        )
    native.cc_library(
        name = name,
        srcs = srcs,
        deps = [":" + name + "_headers"] + [":" + name + "_" + variant for variant in variants],
        # The entry points, which nothing here calls.
        alwayslink = True,
    )

def cuda_kernels(name, srcs, hdrs, kernels_src, nvcc, gencode, variants, deps):
    """A library of CUDA kernels, compiled by nvcc once for each variant, and of what launches them.

    Args:
      name: of the library.
      srcs: sources in C++, for the host.
      hdrs: headers of all.
      kernels_src: the source in CUDA.
      nvcc: path of the compiler; nothing is made where this is None.
      gencode: its flags for the architectures.
      variants: preprocessor definitions of each variant, by its name.
      deps: what the sources in C++ need.
    """
    if not nvcc:
        return
    flags = "-std=c++17 -O3 -I. -Xcompiler=-fPIC --compress-mode=size -diag-suppress=128"
    outs = []
    for variant, defines in variants.items():
        outs.append("%s_%s.pic.o" % (name, variant))
        native.genrule(
            name = "%s_%s" % (name, variant),
            srcs = [kernels_src] + hdrs,
            outs = outs[-1:],
            cmd = "%s %s %s %s -c $(location %s) -o $@" % (
                nvcc,
                flags,
                gencode,
                " ".join(["-D" + define for define in defines]),
                kernels_src,
            ),
        )
    native.cc_library(
        name = name + "_host",
        srcs = srcs,
        hdrs = hdrs,
        deps = deps,
        alwayslink = True,
    )
    native.cc_library(
        name = name,
        srcs = outs,
        hdrs = hdrs,
        # What launches them stands behind them.
        alwayslink = True,
        deps = [":%s_host" % name],
    )

"""CPU kernels that are compiled once for each instruction set and chosen at run time."""

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
    )

def cuda_kernels(name, src, hdrs, nvcc, gencode, variants):
    """Object files of one CUDA source, compiled by nvcc once for each variant.

    Args:
      name: of the filegroup of all of them.
      src: the source.
      hdrs: headers that it includes.
      nvcc: path of the compiler.
      gencode: its flags for the architectures.
      variants: preprocessor definitions of each variant, by its name.
    """
    flags = "-std=c++17 -O3 -I. -Xcompiler=-fPIC --compress-mode=size -diag-suppress=128"
    outs = []
    for variant, defines in variants.items():
        out = "%s_%s.pic.o" % (name, variant)
        native.genrule(
            name = "%s_%s" % (name, variant),
            srcs = [src] + hdrs,
            outs = [out],
            cmd = "%s %s %s %s -c $(location %s) -o $@" % (
                nvcc,
                flags,
                gencode,
                " ".join(["-D" + define for define in defines]),
                src,
            ),
        )
        outs.append(out)
    native.filegroup(
        name = name,
        srcs = outs,
    )

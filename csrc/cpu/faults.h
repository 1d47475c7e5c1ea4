// Seeded faults, for the tests of the tests: in a build with CMFAST_FAULTS, FAULT(name) is whether the fault is set.
#pragma once

namespace cmfast {

#ifdef CMFAST_FAULTS
#define CMFAST_FAULT_NAMES(name)                                                                                      \
  name(counter_words_swapped) name(block_of_normals_repeated) name(last_tile_short) name(strides_of_x)                \
  name(tail_of_channels_missed) name(variance_not_merged) name(second_input_from_zero) name(tail_of_keys_attended)    \
  name(sum_not_rescaled) name(last_queries_missed) name(padding_one_row_off) name(padding_not_zero)                   \
  name(tile_edge_missed) name(tail_of_outputs_missed) name(tail_of_products_missed) name(residual_of_first_sample)    \
  name(residual_not_resampled) name(moments_not_merged) name(activation_of_padding) name(second_moments_from_zero)    \
  name(tail_of_kernels_missed) name(first_kernels_missed) name(last_rows_missed) name(part_across_samples)         \
  name(strides_swapped) name(paddings_swapped) name(depth_stride_missed) name(depth_tap_one_off)                      \
  name(depth_edge_not_zero) name(moments_of_one_image) name(images_of_one_sample) name(mean_not_subtracted)         \
  name(rows_of_first_sample) name(relu_before_residual) name(barrier_missed)           \
  name(gate_of_first_position) name(last_sums_missed) name(gradient_of_mean_missed)                                 \
  name(gradient_of_variance_missed) name(delta_missed) name(first_part_only) name(last_keys_missed)                  \
  name(clip_of_gradient_missed) name(gradient_of_input_missed) name(low_terms_missed) name(later_units_missed)         \
  name(remainders_missed) name(values_not_rescaled) name(quadrant_one_off) name(tail_of_positions_missed)
#define CMFAST_FAULT_ENUM(name) FAULT_##name,
enum Fault { CMFAST_FAULT_NAMES(CMFAST_FAULT_ENUM) FAULTS_COUNT };
extern int fault;
#define FAULT(name) (__builtin_expect(cmfast::fault == cmfast::FAULT_##name, 0))
#else
#define FAULT(name) false
#endif

}  // namespace cmfast

// Convolution of basis values: a tile of samples is expanded to C * K channels, convolved and thrown away; backward expands it again.
#include "basis_tile.h"

namespace kan {
namespace {

constexpr int64_t kTileElements = 1 << 22;  // of expanded channels
constexpr int64_t kPixels = 1024;           // of a channel, evaluated at a time

using Sizes = std::vector<int64_t>;

struct Geometry {
  Sizes stride, padding, dilation;
  int64_t groups;
  bool pad_input;
  int64_t dimensions() const { return int64_t(stride.size()); }
  // What is left to the convolution to pad.
  Sizes feature_padding() const { return pad_input ? Sizes(padding.size(), 0) : padding; }
};

Tensor convolve(const Tensor& input, const Tensor& weight, const Geometry& g) {
  AtenTensorHandle result = nullptr;
  const Sizes padding = g.feature_padding(), zero(g.dimensions(), 0);
  const int64_t d = g.dimensions();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(input.get(), weight.get(), nullptr, g.stride.data(), d, padding.data(), d,
                                                           g.dilation.data(), d, 0, zero.data(), d, g.groups, &result));
  return phyla::dense(Tensor(result));
}

// Gradients of a convolution by its input and its weight; one that is not wanted comes back undefined.
std::pair<std::optional<Tensor>, std::optional<Tensor>> convolve_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                                          const Geometry& g, bool by_input, bool by_weight) {
  AtenTensorHandle results[3] = {nullptr, nullptr, nullptr};
  const Sizes padding = g.feature_padding(), zero(g.dimensions(), 0);
  const int64_t d = g.dimensions();
  const int32_t mask[3] = {by_input, by_weight, 0};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(grad.get(), input.get(), weight.get(), nullptr, 0, g.stride.data(), d,
                                                                    padding.data(), d, g.dilation.data(), d, 0, zero.data(), d, g.groups, mask, 3,
                                                                    &results[0], &results[1], &results[2]));
  std::optional<Tensor> taken[3];
  for (int j = 0; j < 3; ++j)
    if (results[j]) taken[j] = Tensor(results[j]);
  return {by_input ? std::optional(phyla::dense(*taken[0])) : std::nullopt, by_weight ? std::optional(phyla::dense(*taken[1])) : std::nullopt};
}

template <class T>
struct Problem {
  Geometry geometry;
  Tensor x, weight;  // weight (O, C / g * K', *R): coef, with base_weight as one more function
  int64_t samples, channels, functions, columns;
  bool has_base;
  Activation base;
  BasisArguments<T> basis;
  std::array<int64_t, 3> size{1, 1, 1}, margin{0, 0, 0}, padded{1, 1, 1};  // of the image, of the zeros around it, of both
  int64_t pixels = 1;                                                    // of a padded image

  Problem(const Tensor& x, const Tensor& coef, const std::optional<Tensor>& base_weight, BasisArguments<T> basis, const std::string& base,
          Geometry geometry)
      : geometry(std::move(geometry)), x(phyla::dense(x)), samples(x.size(0)), channels(x.size(1)), functions(coef.size(2)),
        columns(functions + base_weight.has_value()), has_base(base_weight.has_value()), base(activation_of(base)), basis(std::move(basis)) {
    const int64_t d = this->geometry.dimensions();
    for (int64_t j = 0; j < d; ++j) {
      size[3 - d + j] = x.size(2 + j);
      if (this->geometry.pad_input) margin[3 - d + j] = this->geometry.padding[j];
    }
    for (int j = 0; j < 3; ++j) pixels *= padded[j] = size[j] + 2 * margin[j];
    weight = joined(phyla::dense(coef), base_weight);
  }

  Tensor joined(const Tensor& coef, const std::optional<Tensor>& base_weight) const {
    Sizes sizes = phyla::sizes_of(coef);
    const int64_t rows = sizes[0] * sizes[1];
    sizes[1] *= columns;
    sizes.erase(sizes.begin() + 2);
    Tensor result = phyla::empty<T>(sizes);
    const int64_t taps = rows ? coef.numel() / std::max<int64_t>(1, rows * functions) : 0;
    const Tensor base_dense = base_weight ? phyla::dense(*base_weight) : coef;
    for (int64_t r = 0; r < rows; ++r) {
      T* to = phyla::mutable_data<T>(result) + r * columns * taps;
      std::copy_n(phyla::data<T>(coef) + r * functions * taps, functions * taps, to);
      if (base_weight) std::copy_n(phyla::data<T>(base_dense) + r * taps, taps, to + functions * taps);
    }
    return result;
  }

  int64_t tile() const { return std::max<int64_t>(1, kTileElements / std::max<int64_t>(1, channels * columns * pixels)); }
  Tensor features(int64_t count) const {
    Sizes sizes{count, channels * columns};
    for (int64_t j = 3 - geometry.dimensions(); j < 3; ++j) sizes.push_back(padded[j]);
    return phyla::empty<T>(sizes);
  }
  Tensor slice(const Tensor& t, int64_t begin, int64_t count) const {  // samples of a contiguous tensor
    Sizes sizes = phyla::sizes_of(t), strides(sizes.size(), 1);
    for (size_t j = sizes.size() - 1; j > 0; --j) strides[j - 1] = strides[j] * sizes[j];
    sizes[0] = count;
    return torch::stable::from_blob(const_cast<T*>(phyla::data<T>(t)) + begin * strides[0], {sizes.data(), sizes.size()},
                                    {strides.data(), strides.size()}, torch::stable::Device(torch::headeronly::DeviceType::CPU), phyla::dtype_of<T>());
  }

  // fn(row of the image, the same row of the padded image, pixels in it)
  template <class Fn>
  void rows(const Fn& fn) const {
    for (int64_t a = 0; a < size[0]; ++a)
      for (int64_t b = 0; b < size[1]; ++b)
        fn((a * size[1] + b) * size[2], ((a + margin[0]) * padded[1] + b + margin[1]) * padded[2] + margin[2], size[2]);
  }
  // The padded image of a channel, in whole vectors.
  void image(int64_t sample, int64_t channel, T* to) const {
    const T* from = phyla::data<T>(x) + (sample * channels + channel) * size[0] * size[1] * size[2];
    std::fill_n(to, whole_vectors(pixels), T(0));
    rows([&](int64_t plain, int64_t at, int64_t n) { std::copy_n(from + plain, n, to + at); });
  }

  // Basis values of `count` samples from `begin` on: (count, C * K', *padded).
  void expand(int64_t begin, int64_t count, T* to) const {
    phyla::parallel_units(count * channels, [&](int64_t unit) {
      const int64_t channel = unit % channels;
      std::vector<T> plane(whole_vectors(pixels)), values(columns * kPixels);
      image(begin + unit / channels, channel, plane.data());
      for (int64_t p = 0; p < pixels; p += kPixels) {
        const int64_t n = std::min(kPixels, pixels - p);
        evaluate(basis, channel, 1, whole_vectors(n), plane.data() + p, values.data(), kPixels);
        if (has_base) activation(base, whole_vectors(n), plane.data() + p, values.data() + functions * kPixels, nullptr);
        for (int64_t k = 0; k < columns; ++k) std::copy_n(values.data() + k * kPixels, n, to + (unit * columns + k) * pixels + p);
      }
    });
  }
};

template <class T>
Tensor forward(const Problem<T>& p, Sizes out_sizes) {
  Tensor y = phyla::empty<T>(out_sizes);
  if (y.numel() == 0) return y;
  const int64_t each = y.numel() / p.samples;
  for (int64_t begin = 0; begin < p.samples; begin += p.tile()) {
    const int64_t count = std::min(p.tile(), p.samples - begin);
    Tensor features = p.features(count);
    p.expand(begin, count, phyla::mutable_data<T>(features));
    const Tensor part = convolve(features, p.weight, p.geometry);
    std::copy_n(phyla::data<T>(part), count * each, phyla::mutable_data<T>(y) + begin * each);
  }
  return y;
}

template <class T>
struct Gradients {
  Tensor x, weight;
  std::vector<double> first, second;  // (C, K)
};

template <class T>
Gradients<T> backward(const Problem<T>& p, const Tensor& grad, int64_t needs) {
  const bool need_weight = needs & 6, need_first = needs & 8, need_second = needs & 16, need_features = (needs & 1) || need_first || need_second;
  Gradients<T> d{phyla::zeros<T>(phyla::sizes_of(p.x)), phyla::zeros<T>(phyla::sizes_of(p.weight)), {}, {}};
  d.first.assign(need_first ? p.channels * p.functions : 0, 0.0);
  d.second.assign(need_second ? p.channels * p.functions : 0, 0.0);
  if (grad.numel() == 0) return d;
  T *d_x = phyla::mutable_data<T>(d.x), *d_weight = phyla::mutable_data<T>(d.weight);
  for (int64_t begin = 0; begin < p.samples; begin += p.tile()) {
    const int64_t count = std::min(p.tile(), p.samples - begin);
    Tensor features = p.features(count);
    if (need_weight) p.expand(begin, count, phyla::mutable_data<T>(features));
    const auto [by_features, by_weight] = convolve_backward(p.slice(grad, begin, count), features, p.weight, p.geometry, need_features, need_weight);
    if (need_weight)
      for (int64_t j = 0; j < d.weight.numel(); ++j) d_weight[j] += phyla::data<T>(*by_weight)[j];
    if (!need_features) continue;
    const T* t = phyla::data<T>(*by_features);
    // A thread owns a channel, and with it the parameters of the channel.
    phyla::parallel_units(p.channels, [&](int64_t channel) {
      const int64_t plane_size = whole_vectors(p.pixels);
      std::vector<T> plane(plane_size), dx(plane_size), tile(p.columns * kPixels), slope(kPixels);
      for (int64_t s = 0; s < count; ++s) {
        p.image(begin + s, channel, plane.data());
        for (int64_t q = 0; q < p.pixels; q += kPixels) {
          const int64_t n = std::min(kPixels, p.pixels - q), padded = whole_vectors(n);
          for (int64_t k = 0; k < p.columns; ++k) {
            std::copy_n(t + ((s * p.channels + channel) * p.columns + k) * p.pixels + q, n, tile.data() + k * kPixels);
            std::fill_n(tile.data() + k * kPixels + n, padded - n, T(0));
          }
          pullback(p.basis, channel, 1, padded, plane.data() + q, tile.data(), dx.data() + q, kPixels,
                   need_first ? d.first.data() + channel * p.functions : nullptr, need_second ? d.second.data() + channel * p.functions : nullptr);
          if (!p.has_base) continue;
          activation(p.base, padded, plane.data() + q, nullptr, slope.data());
          for (int64_t j = 0; j < n; ++j) dx[q + j] += slope[j] * tile[p.functions * kPixels + j];
        }
        T* to = d_x + ((begin + s) * p.channels + channel) * p.size[0] * p.size[1] * p.size[2];
        p.rows([&](int64_t plain, int64_t at, int64_t n) { std::copy_n(dx.data() + at, n, to + plain); });
      }
    });
  }
  return d;
}

template <class T>
Problem<T> problem(const Tensor& x, const Tensor& coef, const std::optional<Tensor>& base_weight, const std::optional<Tensor>& first,
                   const std::optional<Tensor>& second, const std::string& kind, const std::string& base, const Sizes& ints,
                   const std::vector<double>& floats, const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups, bool pad_input) {
  return {x, coef, base_weight, basis_arguments<T>(kind, ints, floats, first, second), base, {stride, padding, dilation, groups, pad_input}};
}

Tensor basis_conv(const Tensor& x, const Tensor& coef, const std::optional<Tensor>& base_weight, const std::optional<Tensor>& first,
                  const std::optional<Tensor>& second, const std::string& kind, const std::string& base, const Sizes& ints,
                  const std::vector<double>& floats, const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups, bool pad_input) {
  Sizes sizes{x.size(0), coef.size(0)};
  for (size_t j = 0; j < stride.size(); ++j)
    sizes.push_back((x.size(2 + j) + 2 * padding[j] - dilation[j] * (coef.size(3 + j) - 1) - 1) / stride[j] + 1);
  return phyla::dispatch(x, [&](auto zero) {
    using scalar = decltype(zero);
    return forward(problem<scalar>(x, coef, base_weight, first, second, kind, base, ints, floats, stride, padding, dilation, groups, pad_input), sizes);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> basis_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& coef,
                                                                       const std::optional<Tensor>& base_weight, const std::optional<Tensor>& first,
                                                                       const std::optional<Tensor>& second, const std::string& kind,
                                                                       const std::string& base, const Sizes& ints, const std::vector<double>& floats,
                                                                       const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                                                       int64_t groups, bool pad_input, int64_t needs) {
  needs &= 3 | (base_weight ? 4 : 0) | (first ? 8 : 0) | (second ? 16 : 0);
  return phyla::dispatch(x, [&](auto zero) {
    using scalar = decltype(zero);
    const Problem<scalar> p = problem<scalar>(x, coef, base_weight, first, second, kind, base, ints, floats, stride, padding, dilation, groups, pad_input);
    const Gradients<scalar> d = backward(p, phyla::dense(grad), needs);
    const Tensor none = phyla::unwanted<scalar>();
    Tensor d_coef = needs & 2 ? phyla::empty<scalar>(phyla::sizes_of(coef)) : none;
    Tensor d_base = needs & 4 ? phyla::empty<scalar>(phyla::sizes_of(*base_weight)) : none;
    const int64_t rows = coef.size(0) * coef.size(1), taps = coef.numel() / std::max<int64_t>(1, rows * p.functions);
    for (int64_t r = 0; r < rows && (needs & 6); ++r) {
      const scalar* from = phyla::data<scalar>(d.weight) + r * p.columns * taps;
      if (needs & 2) std::copy_n(from, p.functions * taps, phyla::mutable_data<scalar>(d_coef) + r * p.functions * taps);
      if (needs & 4) std::copy_n(from + p.functions * taps, taps, phyla::mutable_data<scalar>(d_base) + r * taps);
    }
    return std::make_tuple(needs & 1 ? d.x : none, d_coef, d_base, parameter_gradient<scalar>(first, d.first, p.functions),
                           parameter_gradient<scalar>(second, d.second, p.functions));
  });
}

}  // namespace
}  // namespace kan

STABLE_TORCH_LIBRARY_IMPL(phyla_kan_family, CPU, m) {
  m.impl("basis_conv", TORCH_BOX(&kan::basis_conv));
  m.impl("basis_conv_backward", TORCH_BOX(&kan::basis_conv_backward));
}

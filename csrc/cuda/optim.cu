// In-place SGD and AdamW on regions of a list of tensors: as many in a launch as its arguments take.
// The arithmetic and its order are those of the kernels for the CPU; elements do not depend on each
// other. Everything is checked before anything is written.

#include <cmath>
#include <type_traits>

#include "regions.h"

namespace {

using namespace partial_kernels;

// Parameter, gradient, two states, mask.
constexpr int streams = 5;
constexpr unsigned items_by_thread = 4;

struct SgdOptions {
  double lr, momentum;
  bool nesterov;
  double weight_decay;
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
};

template <class T>
struct Sgd {
  using Options = SgdOptions;
  T minus_lr, momentum, decay;
  bool has_momentum, nesterov, has_decay;

  Sgd() = default;
  __host__ __device__ Sgd(const Options& o, int64_t)
      : minus_lr(T(-o.lr)),
        momentum(T(o.momentum)),
        decay(T(o.weight_decay)),
        has_momentum(o.momentum != 0),
        nesterov(o.nesterov),
        has_decay(o.weight_decay != 0) {}

  __device__ void operator()(T& p, T g, T& m, T&) const {
    if (has_decay) g = fma(p, decay, g);
    if (has_momentum) {
      m = m * momentum + g;
      g = nesterov ? fma(m, momentum, g) : m;
    }
    p = fma(g, minus_lr, p);
  }
};

template <class T>
struct AdamW {
  using Options = AdamWOptions;
  T decay, toward_g, beta2, one_minus_beta2, correction2, eps, minus_rate;
  bool from_g;

  AdamW() = default;
  // Constants are computed in fp64, as Python does.
  __host__ __device__ AdamW(const Options& o, int64_t step)
      : decay(T(1 - o.lr * o.weight_decay)),
        beta2(T(o.beta2)),
        one_minus_beta2(T(1 - o.beta2)),
        correction2(T(pow(1 - pow(o.beta2, double(step)), 0.5))),
        eps(T(o.eps)),
        minus_rate(T(-o.lr / (1 - pow(o.beta1, double(step))))) {
    // torch.lerp starts at the end that is closer.
    const T weight = T(1 - o.beta1);
    from_g = !(weight < T(0.5));
    toward_g = from_g ? weight - T(1) : weight;
  }

  __device__ void operator()(T& p, T g, T& m, T& v) const {
    p = p * decay;
    m = fma(toward_g, g - m, from_g ? g : m);
    v = fma(one_minus_beta2 * g, g, v * beta2);
    const T denominator = sqrt(v) / correction2 + eps;
    p = p + minus_rate * m / denominator;
  }
};

// The numbers of one stream of an item, to registers and back.
template <class S>
struct alignas(sizeof(S) * item_size) Vector {
  S values[item_size];
};

template <class S, class T>
__device__ __forceinline__ void load(const Item<streams>& item, int stream, T (&to)[item_size]) {
  if (item.adjoins) {
    const auto vector = *item.template at<const Vector<S>>(stream, 0);
#pragma unroll
    for (int i = 0; i < item_size; ++i) to[i] = widened(vector.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < item_size; ++i)
      if (item.kept >> i & 1) to[i] = widened(*item.template at<const S>(stream, i));
  }
}

template <class S, class T>
__device__ __forceinline__ void store(const Item<streams>& item, int stream,
                                      const T (&from)[item_size]) {
  if (item.adjoins) {
    Vector<S> vector;
#pragma unroll
    for (int i = 0; i < item_size; ++i) vector.values[i] = narrowed<S>(from[i]);
    *item.template at<Vector<S>>(stream, 0) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < item_size; ++i)
      if (item.kept >> i & 1) *item.template at<S>(stream, i) = narrowed<S>(from[i]);
  }
}

// All is loaded before anything is stored: what is far apart is waited for at the same time.
template <class P, class G, class Rule>
__device__ __forceinline__ void step_item(const Rule& rule, const Item<streams>& item) {
  using T = Arithmetic<P>;
  const bool has_m = item.region.base[2], has_v = item.region.base[3];
  T p[item_size] = {}, g[item_size] = {}, m[item_size] = {}, v[item_size] = {};
  load<P>(item, 0, p);
  load<G>(item, 1, g);
  if (has_m) load<T>(item, 2, m);
  if (has_v) load<T>(item, 3, v);
#pragma unroll
  for (int i = 0; i < item_size; ++i) rule(p[i], g[i], m[i], v[i]);
  store<P>(item, 0, p);
  if (has_m) store<T>(item, 2, m);
  if (has_v) store<T>(item, 3, v);
}

// A region's rule, or where on the device it is.
template <class Rule>
struct RuleOrPlace {
  Rule rule;
  const Rule* place;
};
template <class Rule>
using Regions = Batch<streams, RuleOrPlace<Rule>, items_by_thread>;

// Rules of a learning rate or of counts of updates that the device alone knows. In a launch of its
// own: powers in fp64 take longer than a block's share of a step.
template <class Rule>
__global__ void make_rules(typename Rule::Options options, const double* lr, const int64_t* steps,
                           int64_t step, int64_t count, Rule* rules) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (lr) options.lr = *lr;
  if (i < count) rules[i] = Rule(options, steps ? steps[i] : step);
}

// Numbers of 8 bytes take more registers than three blocks leave each other.
template <class P, class G, class Rule>
__global__ void __launch_bounds__(region_threads, sizeof(Arithmetic<P>) == 8 ? 2 : 3)
    step_regions(const __grid_constant__ Regions<Rule> batch) {
  const int r = batch.region_of_block();
  const Rule rule = batch.extra[r].place ? *batch.extra[r].place : batch.extra[r].rule;
  batch.template visit<true>(
      r, [&](const Item<streams>& item) { step_item<P, G>(rule, item); });
}

using Tensors = std::vector<Tensor>;

struct Arguments {
  const Tensors &params, &grads;
  std::array<const Tensors*, 2> states;
  const Selections &rows, &cols, &elements;
};

// Of parameters and gradients; the states and the arithmetic are fp64 for fp64, else fp32.
struct Dtypes {
  ScalarType param, grad;
  bool operator==(const Dtypes&) const = default;
};

// What the rules are made from. On the device are, perhaps: the learning rate, as fp64, and the
// counts of updates, as int64.
template <class Options>
struct Settings {
  Options options;
  const double* lr;
  std::vector<int64_t> steps;
  const int64_t* device_steps;
};

// The rules of all regions, and the memory of those on the device.
template <class Rule>
struct Rules {
  std::vector<RuleOrPlace<Rule>> of_region;
  std::optional<Tensor> memory;
};

template <class Rule>
Rules<Rule> rules_of(const Settings<typename Rule::Options>& settings, const Tensors& params,
                     const Queue& queue) {
  const size_t count = params.size();
  Rules<Rule> rules{std::vector<RuleOrPlace<Rule>>(count), std::nullopt};
  const auto& steps = settings.steps;
  if (!settings.lr && !settings.device_steps) {
    for (size_t i = 0; i < count; ++i)
      rules.of_region[i].rule = Rule(settings.options, steps[i]);
    return rules;
  }
  rules.memory = torch::stable::new_empty(params[0], {int64_t(count * sizeof(Rule))},
                                          torch::headeronly::ScalarType::Byte);
  auto* made = static_cast<Rule*>(rules.memory->data_ptr());
  const auto make = [&](size_t first, size_t some, int64_t step) {
    queue.run(&make_rules<Rule>, dim3(unsigned(ceil_div(int64_t(some), 128))), 128,
              settings.options, settings.lr, settings.device_steps, step, int64_t(some),
              made + first);
  };
  if (settings.device_steps || std::ranges::count(steps, steps[0]) == std::ssize(steps))
    make(0, count, steps.empty() ? 0 : steps[0]);
  else
    for (size_t i = 0; i < count; ++i) make(i, 1, steps[i]);
  for (size_t i = 0; i < count; ++i) rules.of_region[i].place = made + i;
  return rules;
}

// The elements to update in one tensor.
struct Update {
  Region<streams> region;
  Dtypes dtypes;
  // The number of the parameter.
  size_t number;
};

// All that there is to update, if the arguments fit.
std::vector<Update> updates_of(const Arguments& arguments) {
  const size_t count = arguments.params.size();
  bool equal = arguments.grads.size() == count && arguments.rows.size() == count &&
               arguments.cols.size() == count && arguments.elements.size() == count;
  for (const Tensors* states : arguments.states)
    equal = equal && (!states || states->size() == count);
  STD_TORCH_CHECK(equal, "lists must have one entry per parameter");
  std::vector<Update> updates;
  for (size_t i = 0; i < count; ++i) {
    const Dtypes dtypes{arguments.params[i].scalar_type(), arguments.grads[i].scalar_type()};
    const ScalarType state =
        dtypes.param == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(dtypes.param == state || dtypes.param == ScalarType::BFloat16 ||
                        dtypes.param == ScalarType::Half,
                    "parameters must be fp32, fp64, bf16 or fp16");
    STD_TORCH_CHECK(dtypes.grad == dtypes.param || dtypes.grad == state,
                    "gradients must be in the parameters' or the states' dtype");
    std::array<const Tensor*, streams - 1> tensors{&arguments.params[i], &arguments.grads[i]};
    for (size_t k = 0; k < 2; ++k) {
      if (!arguments.states[k]) continue;
      tensors[2 + k] = &(*arguments.states[k])[i];
      STD_TORCH_CHECK(tensors[2 + k]->scalar_type() == state,
                      "states must be fp32, fp64 for fp64 parameters");
    }
    bool any = false;
    const auto region = region_of<streams>(tensors, arguments.rows[i], arguments.cols[i],
                                           arguments.elements[i], any);
    if (any) updates.push_back({region, dtypes, i});
  }
  return updates;
}

// Launches the updates of parameters and gradients of these types.
template <class P, class G, class Rule>
void step_of(const std::vector<Update>& updates, const Tensors& params,
             const Settings<typename Rule::Options>& settings, const Dtypes& dtypes) {
  const Queue queue(params[0]);
  const auto rules = rules_of<Rule>(settings, params, queue);
  Regions<Rule> batch;
  batch.clear();
  const auto launch = [&] {
    if (batch.count)
      queue.run(&step_regions<P, G, Rule>, dim3(batch.blocks), region_threads, batch);
    batch.clear();
  };
  for (const Update& update : updates) {
    if (update.dtypes == dtypes) batch.add(update.region, rules.of_region[update.number]);
    if (batch.full()) launch();
  }
  launch();
}

// Calls step_of for each pair of types that occurs.
template <template <class> class Rule>
void step(const Arguments& arguments, const Settings<typename Rule<float>::Options>& settings) {
  const auto updates = updates_of(arguments);
  std::vector<Dtypes> found;
  for (const Update& update : updates)
    if (std::ranges::find(found, update.dtypes) == found.end()) found.push_back(update.dtypes);
  for (const Dtypes& dtypes : found) {
    const auto run = [&]<class P, class G>(P, G) {
      step_of<P, G, Rule<Arithmetic<P>>>(updates, arguments.params, settings, dtypes);
    };
    const bool mixed = dtypes.param != dtypes.grad;
    switch (dtypes.param) {
      case ScalarType::Float:
        run(float(), float());
        break;
      case ScalarType::Double:
        run(double(), double());
        break;
      case ScalarType::BFloat16:
        mixed ? run(Bf16(), float()) : run(Bf16(), Bf16());
        break;
      default:
        mixed ? run(Fp16(), float()) : run(Fp16(), Fp16());
    }
  }
}

// A learning rate, on the device or not: the number, or where it is.
const double* on_device(const std::optional<Tensor>& lr) {
  if (!lr) return nullptr;
  STD_TORCH_CHECK(lr->scalar_type() == ScalarType::Double && lr->numel() == 1,
                  "lr must be one fp64 number");
  return lr->const_data_ptr<double>();
}

void sgd(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
         const Selections& rows, const Selections& cols, const Selections& elements, double lr,
         const std::optional<Tensor>& device_lr, double momentum, bool nesterov,
         double weight_decay) {
  const Tensors* buffers = momentum != 0 ? &momentum_buffers : nullptr;
  const SgdOptions options{lr, momentum, nesterov, weight_decay};
  step<Sgd>({params, grads, {buffers, nullptr}, rows, cols, elements},
            {options, on_device(device_lr), std::vector<int64_t>(params.size()), nullptr});
}

void adamw(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
           const Tensors& exp_avg_sqs, const Selections& rows, const Selections& cols,
           const Selections& elements, const std::vector<int64_t>& steps,
           const std::optional<Tensor>& device_steps, double lr,
           const std::optional<Tensor>& device_lr, double beta1, double beta2, double eps,
           double weight_decay) {
  const int64_t count = device_steps ? device_steps->size(0) : int64_t(steps.size());
  STD_TORCH_CHECK(size_t(count) == params.size(), "lists must have one entry per parameter");
  const AdamWOptions options{lr, beta1, beta2, eps, weight_decay};
  step<AdamW>({params, grads, {&exp_avgs, &exp_avg_sqs}, rows, cols, elements},
              {options, on_device(device_lr), steps,
               device_steps ? index_data(*device_steps) : nullptr});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def(
      "masked_sgd_cuda(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor?[] rows, Tensor?[] cols, Tensor?[] elements, float lr, Tensor? device_lr, "
      "float momentum, bool nesterov, float weight_decay) -> ()");
  m.def(
      "masked_adamw_cuda(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor?[] rows, Tensor?[] cols, Tensor?[] elements, int[] steps, "
      "Tensor? device_steps, float lr, Tensor? device_lr, float beta1, float beta2, float eps, "
      "float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, PK_DEVICE, m) {
  m.impl("masked_sgd_cuda", TORCH_BOX(&sgd));
  m.impl("masked_adamw_cuda", TORCH_BOX(&adamw));
}

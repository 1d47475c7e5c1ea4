// What a network was, to be asked at every call of it whether it still is: written for the time that takes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>

#include "cpu/checksum.h"
#include "cpu/team.h"
#include "torch_tensors.h"

namespace cmfast {

namespace py = pybind11;

// Which objects some dicts hold, and in which order, and of which class the objects are whose attributes they are (None
// where there is no such object); all of them are kept alive by who asks.
class Snapshot {
 public:
  Snapshot(const std::vector<py::dict>& dicts, const std::vector<py::object>& owners) {
    if (owners.size() != dicts.size()) throw py::value_error("expected an owner, or None, for each dict");
    for (size_t i = 0; i < dicts.size(); ++i) {
      PyObject* owner = owners[i].ptr();
      dicts_.push_back({dicts[i].ptr(), owner, Py_TYPE(owner), 0, {}});
      accept(i);
    }
  }

  // The first of the dicts that holds anything else now; -1 where none does.
  int64_t first_difference() {
    for (size_t i = 0; i < dicts_.size(); ++i) {
      Dict& dict = dicts_[i];
      if (!dict.same_class()) return (int64_t)i;
      if (COUNTS_CHANGES && changes(dict.object) == dict.changes) continue;
      if (!same(dict)) return (int64_t)i;
      dict.changes = changes(dict.object);
    }
    return -1;
  }

  // Whether the dicts' numbers of changes tell that none of a share of them was changed. Needs no lock of Python.
  bool unchanged(Share of) const {
    if (!COUNTS_CHANGES) return false;
    for (int64_t i = of.begin; i < of.end; ++i)
      if (changes(dicts_[i].object) != dicts_[i].changes || !dicts_[i].same_class()) return false;
    return true;
  }
  int64_t size() const { return (int64_t)dicts_.size(); }

  // Remember one of the dicts as it is now.
  void accept(size_t i) {
    Dict& dict = dicts_.at(i);
    dict.changes = changes(dict.object);
    dict.items.clear();
    Py_ssize_t at = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict.object, &at, &key, &value)) {
      dict.items.push_back(key);
      dict.items.push_back(value);
    }
  }

 private:
  struct Dict {
    PyObject *object, *owner;
    PyTypeObject* type;  // of the owner
    uint64_t changes;
    std::vector<PyObject*> items;  // keys and values

    bool same_class() const { return Py_TYPE(owner) == type; }
  };

  // Up to Python 3.12 each change gives a dict a number that no dict had before (PEP 509).
#if PY_VERSION_HEX < 0x030D0000
  static constexpr bool COUNTS_CHANGES = true;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  static uint64_t changes(PyObject* dict) { return ((PyDictObject*)dict)->ma_version_tag; }
#pragma GCC diagnostic pop
#else
  static constexpr bool COUNTS_CHANGES = false;
  static uint64_t changes(PyObject*) { return 0; }
#endif

  bool same(const Dict& dict) const {
    if (2 * (size_t)PyDict_Size(dict.object) != dict.items.size()) return false;
    PyObject* const* item = dict.items.data();
    Py_ssize_t at = 0;
    PyObject *key, *value;
    for (; PyDict_Next(dict.object, &at, &key, &value); item += 2)
      if (key != item[0] || value != item[1]) return false;
    return true;
  }

  std::vector<Dict> dicts_;
};

// Tensors, with whether torch counts the writes to each and whether it has elements in this memory.
using Tensors = std::vector<std::tuple<py::object, bool, bool>>;
using Parts = std::vector<std::pair<uintptr_t, int64_t>>;

// How often torch has counted writes to tensors, what they are (dtype, sizes, strides) and where their elements are, and a
// sample of the elements, whose addresses and sizes in bytes are the parts.
class TensorSnapshot {
 public:
  // by_methods: by Tensor's methods and attributes, as where torch's own functions are not to be had.
  TensorSnapshot(const Tensors& tensors, const Parts& parts, bool by_methods) {
    if (!by_methods) torch_ = torch_functions();
    for (const auto& [t, counted, placed] : tensors) {
      Seen seen{t, counted, placed, torch_ ? at_tensor(t) : nullptr, 0, {}, address(t), 0};
      if (counted) seen.version = version(seen);
      if (placed) seen.place = place(seen), seen.storage = address(t.attr("untyped_storage")());
      seen_.push_back(std::move(seen));
    }
    auto middle = parts.begin() + (int64_t)parts.size() / 2;
    for (const Parts& half : {Parts(parts.begin(), middle), Parts(middle, parts.end())}) {
      Sample sample(half);
      samples_.push_back({sample, sample.checksum()});
    }
  }

  // Whether torch has counted no write, and the elements are where they were: where their addresses are others, the old
  // ones may not be read any more.
  bool same_places() const {
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (i + AHEAD < seen_.size()) seen_[i + AHEAD].prefetch();
      const Seen& seen = seen_[i];
      if (seen.counted && version(seen) != seen.version) return false;
      if (seen.placed && !same_place(seen)) return false;
    }
    return true;
  }

  // Whether the elements of one half of the tensors, 0 or 1, are the same. Needs no lock of Python.
  bool same_elements(int half) const { return samples_[half].first.checksum() == samples_[half].second; }

 private:
  struct Place {
    const void* address = nullptr;
    int32_t dtype = 0;
    py::object of_python;             // by methods: dtype, address, sizes and strides
    std::vector<int64_t> dimensions;  // else: sizes, then strides
  };
  struct Seen {
    py::object tensor;
    bool counted, placed;
    const void* at_tensor;  // null where methods are asked
    uint64_t version;
    Place place;
    // Of torch's own objects: they are nowhere in the cache after an evaluation, which reads none of them.
    uintptr_t impl, storage;

    void prefetch() const {
      __builtin_prefetch(tensor.ptr());
      __builtin_prefetch(place.dimensions.data());
      for (int byte = 0; byte < 256; byte += 64) __builtin_prefetch((const char*)impl + byte);
      for (int byte = 0; byte < 128; byte += 64) __builtin_prefetch((const char*)storage + byte);
    }
  };
  static constexpr size_t AHEAD = 6;  // tensors

  uint64_t version(const Seen& seen) const {
    if (seen.at_tensor) return (uint64_t)torch_.version(seen.at_tensor);
    return seen.tensor.attr("_version").cast<uint64_t>();
  }

  // What torch tells of a tensor; its sizes and strides stay torch's.
  struct Found {
    int32_t dtype = 0;
    const void* address = nullptr;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  };
  Found found(const void* t) const {
    Found f;
    if (torch_.dtype(t, &f.dtype) || torch_.data(t, &f.address) || torch_.dim(t, &f.dim) ||
        torch_.sizes(t, &f.sizes) || torch_.strides(t, &f.strides))
      throw std::runtime_error("torch cannot tell where the elements of a tensor are");
    return f;
  }
  static py::object by_methods(const py::object& t) {
    return py::make_tuple(t.attr("dtype"), t.attr("data_ptr")(), t.attr("shape"), t.attr("stride")());
  }

  Place place(const Seen& seen) const {
    Place result;
    if (!seen.at_tensor) {
      result.of_python = by_methods(seen.tensor);
      return result;
    }
    Found f = found(seen.at_tensor);
    result.address = f.address, result.dtype = f.dtype;
    result.dimensions.assign(f.sizes, f.sizes + f.dim);
    result.dimensions.insert(result.dimensions.end(), f.strides, f.strides + f.dim);
    return result;
  }

  bool same_place(const Seen& seen) const {
    const Place& before = seen.place;
    if (!seen.at_tensor) return by_methods(seen.tensor).equal(before.of_python);
    Found f = found(seen.at_tensor);
    const int64_t* dimensions = before.dimensions.data();
    return f.address == before.address && f.dtype == before.dtype && 2 * (size_t)f.dim == before.dimensions.size() &&
           std::equal(f.sizes, f.sizes + f.dim, dimensions) && std::equal(f.strides, f.strides + f.dim, dimensions + f.dim);
  }

  static uintptr_t address(const py::object& of_torch) { return of_torch.attr("_cdata").cast<uintptr_t>(); }

  TorchFunctions torch_;
  std::vector<Seen> seen_;
  std::vector<std::pair<Sample, uint64_t>> samples_;
};

// The first of the dicts that holds anything else now, or -1, and whether the tensors are the same. The calling thread has
// Python's lock and asks where the tensors are, while the others read the dicts' numbers; then two read elements. Most of
// the time is waiting for memory. It is the team of the kernels that come after: another size would have threads end and
// begin again.
static inline std::pair<int64_t, bool> look(Snapshot& dicts, const TensorSnapshot& tensors, int threads) {
  std::atomic<bool> unchanged{true}, same{false};
  std::exception_ptr thrown;
  auto body = [&](Team team) {
    int others = team.size - 1;
    if (team.rank || !others) {
      Share mine = others ? share(dicts.size(), {team.rank - 1, others}) : Share{0, dicts.size()};
      if (!dicts.unchanged(mine)) unchanged = false;
    }
    if (!team.rank) try {
        same = tensors.same_places();
      } catch (...) {
        thrown = std::current_exception();
      }
    team.barrier();
    if (!same) return;
    for (int half = team.rank; half < 2; half += team.size)
      if (!tensors.same_elements(half)) same = false;
  };
  parallel(threads, body);
  if (thrown) std::rethrow_exception(thrown);
  return {unchanged ? -1 : dicts.first_difference(), (bool)same};
}

}  // namespace cmfast

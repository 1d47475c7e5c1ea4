// What a network was, to be asked at every call of it whether it still is: written for the time that takes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "cpu/checksum.h"
#include "cpu/team.h"
#include "torch_tensors.h"

namespace cmfast {

namespace py = pybind11;

// Which objects some dicts hold, and in which order; they and the dicts are kept alive by who asks.
class Snapshot {
 public:
  explicit Snapshot(const std::vector<py::dict>& dicts) {
    for (const py::dict& dict : dicts) {
      dicts_.push_back({dict.ptr(), 0, {}});
      accept(dicts_.size() - 1);
    }
  }

  // The first of the dicts that holds anything else now; -1 where none does.
  int64_t first_difference() {
    for (size_t i = 0; i < dicts_.size(); ++i) {
      Dict& dict = dicts_[i];
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
      if (changes(dicts_[i].object) != dicts_[i].changes) return false;
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
    PyObject* object;
    uint64_t changes;
    std::vector<PyObject*> items;  // keys and values
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

// How often torch has counted writes to tensors, where their elements are, their strides, and a sample of the elements,
// whose addresses and sizes in bytes are the parts.
class TensorSnapshot {
 public:
  TensorSnapshot(const Tensors& tensors, const Parts& parts) {
    py::object type = py::module_::import("torch").attr("Tensor");
    data_ptr_ = type.attr("data_ptr");
    stride_ = type.attr("stride");
    version_ = type.attr("_version");
    if (Py_TYPE(version_.ptr()) != &PyGetSetDescr_Type) throw py::type_error("torch.Tensor._version is no attribute of C");
    describe_ = describer();  // in nanoseconds, where a method takes 100
    for (const auto& [t, counted, placed] : tensors) {
      dlpack::Tensor found;
      bool described = placed && describe_ && describe_(t.ptr(), &found) == 0;
      PyErr_Clear();  // a dtype that DLPack does not have
      uintptr_t impl = address(t), storage = placed ? address(t.attr("untyped_storage")()) : 0;
      Seen seen{t, counted, placed, described, counted ? version(t) : 0, Place(), impl, storage};
      if (placed) seen.place = place(seen);
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
      if (seen.counted && version(seen.tensor) != seen.version) return false;
      if (seen.placed && !same_place(seen)) return false;
    }
    return true;
  }

  // Whether the elements of one half of the tensors, 0 or 1, are the same. Needs no lock of Python.
  bool same_elements(int half) const { return samples_[half].first.checksum() == samples_[half].second; }

 private:
  struct Place {
    uint64_t address = 0;
    std::vector<int64_t> strides;
  };
  struct Seen {
    py::object tensor;
    bool counted, placed, described;  // described: by DLPack
    uint64_t version = 0;
    Place place;
    // Of torch's own objects: they are nowhere in the cache after an evaluation, which reads none of them.
    uintptr_t impl, storage;

    void prefetch() const {
      __builtin_prefetch(tensor.ptr());
      __builtin_prefetch(place.strides.data());
      for (int byte = 0; byte < 256; byte += 64) __builtin_prefetch((const char*)impl + byte);
      for (int byte = 0; byte < 128; byte += 64) __builtin_prefetch((const char*)storage + byte);
    }
  };
  static constexpr size_t AHEAD = 6;  // tensors

  uint64_t version(const py::object& t) const {
    // Without the search for the attribute's name, which takes as long as reading it.
    const PyGetSetDef* attribute = ((PyGetSetDescrObject*)version_.ptr())->d_getset;
    PyObject* found = attribute->get(t.ptr(), attribute->closure);
    uint64_t number = found ? PyLong_AsUnsignedLongLong(found) : 0;
    Py_XDECREF(found);
    if (PyErr_Occurred()) throw py::error_already_set();
    return number;
  }

  Place place(const Seen& seen) const {
    if (!seen.described)
      return {data_ptr_(seen.tensor).cast<uint64_t>(), stride_(seen.tensor).cast<std::vector<int64_t>>()};
    dlpack::Tensor found = description(seen);
    return {address(found), {found.strides, found.strides + found.ndim}};
  }

  bool same_place(const Seen& seen) const {
    const Place& before = seen.place;
    if (!seen.described) {
      Place now = place(seen);
      return now.address == before.address && now.strides == before.strides;
    }
    dlpack::Tensor found = description(seen);
    return address(found) == before.address &&
           std::equal(found.strides, found.strides + found.ndim, before.strides.begin(), before.strides.end());
  }

  dlpack::Tensor description(const Seen& seen) const {
    dlpack::Tensor found;
    if (describe_(seen.tensor.ptr(), &found)) throw py::error_already_set();
    return found;
  }
  static uintptr_t address(const py::object& of_torch) { return of_torch.attr("_cdata").cast<uintptr_t>(); }
  static uint64_t address(const dlpack::Tensor& t) { return (uint64_t)t.data + t.byte_offset; }

  py::object data_ptr_, stride_, version_;
  Describe describe_ = nullptr;
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

// fastgen._cpu.SeenTensors, SeenAttributes: whether Python objects are what they were, looked at without running Python
// code. Between the calls of a network its weights push the interpreter out of the caches, so that for one image such
// checks in Python cost a tenth of the time.
#include <pybind11/pybind11.h>

#include <vector>

namespace fastgen {
namespace {

namespace py = pybind11;

py::object owned(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

// False where the comparison fails, as that of arrays does.
bool equal(const py::object& a, const py::object& b) {
    const int result = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (result < 0) PyErr_Clear();
    return result > 0;
}

// What tells whether a tensor, or None, is the same one and was not written to by PyTorch.
class SeenTensors {
public:
    explicit SeenTensors(const py::sequence& tensors) {
        for (const py::handle tensor : tensors) {
            seen_.push_back(tensor.is_none() ? Seen{}
                                             : Seen{owned(PyWeakref_NewRef(tensor.ptr(), nullptr)), of(tensor)});
        }
    }

    bool still(const py::sequence& tensors) const {
        const py::object items = owned(PySequence_Fast(tensors.ptr(), "tensors must be a sequence"));
        if (PySequence_Fast_GET_SIZE(items.ptr()) != static_cast<Py_ssize_t>(seen_.size())) return false;
        for (size_t i = 0; i < seen_.size(); ++i) {
            const py::handle tensor = PySequence_Fast_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i));
            const Seen& seen = seen_[i];
            if (seen.reference.ptr() == nullptr && tensor.is_none()) continue;
            if (seen.reference.ptr() == nullptr || tensor.is_none()) return false;
            if (!owned(PyObject_CallNoArgs(seen.reference.ptr())).is(tensor)) return false;
            const State now = of(tensor);
            if (!now.dtype.is(seen.state.dtype) || !equal(now.pointer, seen.state.pointer) ||
                !equal(now.version, seen.state.version) || !equal(now.shape, seen.state.shape) ||
                !equal(now.strides, seen.state.strides))
                return false;
        }
        return true;
    }

private:
    struct State {
        py::object dtype, pointer, version, shape, strides;
    };
    struct Seen {
        py::object reference;  // weak; null for None
        State state;
    };

    State of(py::handle tensor) const {
        const auto get = [&](const py::str& name) { return owned(PyObject_GetAttr(tensor.ptr(), name.ptr())); };
        const auto call = [&](const py::str& name) {
            return owned(PyObject_CallMethodNoArgs(tensor.ptr(), name.ptr()));
        };
        return {get(dtype_), call(data_ptr_), get(version_), get(shape_), call(stride_)};
    }

    py::str dtype_{"dtype"}, data_ptr_{"data_ptr"}, version_{"_version"}, shape_{"shape"}, stride_{"stride"};
    std::vector<Seen> seen_;
};

// Whether objects have the attributes they had, in the same order. It owns nothing, or modules that hold it would never
// be collected: `states`, of (object, copy of its __dict__), must stay alive and as it is.
class SeenAttributes {
public:
    explicit SeenAttributes(const py::list& states) {
        for (const py::handle state : states) {
            const auto pair = py::reinterpret_borrow<py::tuple>(state);
            Seen seen{pair[0].ptr(), {}};
            PyObject *name, *value;
            for (Py_ssize_t i = 0; PyDict_Next(pair[1].ptr(), &i, &name, &value);)
                seen.attributes.push_back({name, value, PyDict_Check(value) && PyDict_Size(value) == 0});
            seen_.push_back(seen);
        }
    }

    bool still() const {
        for (const Seen& seen : seen_) {
            const auto now = owned(PyObject_GenericGetDict(seen.object, nullptr));
            if (PyDict_Size(now.ptr()) != static_cast<Py_ssize_t>(seen.attributes.size())) return false;
            // Side by side rather than by look-ups, which go all over the memory.
            const Attribute* attribute = seen.attributes.data();
            PyObject *name, *value;
            for (Py_ssize_t i = 0; PyDict_Next(now.ptr(), &i, &name, &value); ++attribute) {
                if (name != attribute->name) return false;
                if (value == attribute->value) continue;
                if (attribute->empty_dict && PyDict_Check(value) && PyDict_Size(value) == 0) continue;
                const auto held = [](PyObject* object) { return py::reinterpret_borrow<py::object>(object); };
                if (!equal(held(value), held(attribute->value))) return false;
            }
        }
        return true;
    }

private:
    struct Attribute {
        PyObject *name, *value;
        bool empty_dict;
    };
    struct Seen {
        PyObject* object;
        std::vector<Attribute> attributes;
    };
    std::vector<Seen> seen_;
};

}  // namespace

void bind_unchanged(py::module_& module) {
    py::class_<SeenTensors>(module, "SeenTensors", "Tensors, or None, as they were at some time.")
        .def(py::init<py::sequence>(), py::arg("tensors"))
        .def("still", &SeenTensors::still, py::arg("tensors"), "Whether these are the same, and nothing was written.");
    py::class_<SeenAttributes>(module, "SeenAttributes", "Attributes of objects as they were at some time.")
        .def(py::init<py::list>(), py::arg("states"), "Of (object, copy of its __dict__), which must outlive this.")
        .def("still", &SeenAttributes::still, "Whether all are the same, in the same order.");
}

}  // namespace fastgen

// Owns: turning the dict of ModelDescription.to_core() into the C description. Holds the memory it points to.
#ifndef FM_BIND_DESC_H
#define FM_BIND_DESC_H

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <deque>
#include <string>
#include <vector>

extern "C" {
#include "flashmoe.h"
#include "model/config.h"
#include "store/desc.h"
}

class Description {
public:
    explicit Description(const pybind11::dict &d);
    Description(const Description &) = delete;
    const fm_engine_model *model() const { return &model_; }

private:
    const char *keep(std::string s);
    void read_config(const pybind11::dict &d);
    void read_tensors(const pybind11::sequence &list);
    void read_experts(const pybind11::sequence &list);

    std::deque<std::string> strings_;
    std::deque<std::vector<fm_piece>> pieces_;
    std::vector<pybind11::object> arrays_; // expert tables are used where numpy holds them
    std::vector<fm_desc_file> files_;
    std::vector<fm_tensor_desc> tensors_;
    std::vector<fm_expert_desc> experts_;
    fm_config config_{};
    fm_model_desc desc_{};
    fm_engine_model model_{};
};

fm_engine_opts read_opts(const pybind11::dict &d, std::deque<std::string> &strings);

#endif

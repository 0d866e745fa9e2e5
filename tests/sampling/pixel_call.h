// What a call of the pixel stage works on, as tests/sampling/host_team.py writes it.
//
//     PROGRAM CALL RESULT
//
// CALL holds entries: a name of 24 bytes, the number of bytes as int64, and the bytes. RESULT takes the workspace and the
// levels.
#pragma once

#include <fstream>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/pixel_stage.h"

struct PixelCall {
    explicit PixelCall(const char* path) {
        std::ifstream file(path, std::ios::binary);
        char name[25] = {};
        int64_t size;
        while (file.read(name, 24) && file.read(reinterpret_cast<char*>(&size), sizeof(size))) {
            std::vector<char>& entry = entries[name];
            entry.resize(size);
            file.read(entry.data(), size);
        }
        const auto point = [&](const char* of, auto& pointer) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(entries.at(of).data());
        };
        for_each_pixel_table(stage, point);
        for_each_pixel_size(stage, [&](const char* of, int64_t& value) { value = number(of); });
        point("actions", batch.actions);
        batch.num_actions = number("num_actions");
        batch.count = number("count");
        batch.streams = number("streams");
        point("workspace", batch.workspace);
        point("where", batch.where);
        point("state", batch.state);
        point("inverse_temperature", batch.inverse_temperature);
        point("top_k", batch.top_k);
        point("top_p", batch.top_p);
        point("guidance", batch.guidance);
        point("levels", batch.levels);
        point("known", batch.known);
        point("mask", batch.mask);
    }

    int64_t number(const char* name) const { return *reinterpret_cast<const int64_t*>(entries.at(name).data()); }

    void write(const char* path) const {
        std::ofstream result(path, std::ios::binary);
        for (const char* name : {"workspace", "levels"}) {
            const std::vector<char>& entry = entries.at(name);
            result.write(entry.data(), static_cast<std::streamsize>(entry.size()));
        }
    }

    std::map<std::string, std::vector<char>> entries;
    fastgen::PixelStage stage{};
    fastgen::PixelBatch batch{};
};

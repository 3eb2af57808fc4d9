// A C handle that any Python thread may use or close: closing waits for the calls that are under way, and in a
// forked child does nothing, because the threads that would end those calls are in the parent.
#ifndef FM_BIND_HANDLE_H
#define FM_BIND_HANDLE_H

#include <sys/types.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <string>

#include <pybind11/pybind11.h>

#include "bind/errors.h"

template <typename T>
class Handle {
public:
    Handle(const char *what, void (*free)(T *)) : what_(what), free_(free) {}
    Handle(const Handle &) = delete;

    // One call's hold on the handle; FM_ERR_STATE when it is closed.
    class Use {
    public:
        explicit Use(Handle &h) : h_(&h)
        {
            if (h.pid_ != getpid())
                fail(FM_ERR_STATE, std::string("the ") + h.what_ + " was opened in process " + std::to_string(h.pid_) +
                                       " and cannot be used in a forked child; open it there");
            const std::lock_guard<std::mutex> lock(h.mutex_);
            if (h.closed_)
                fail(FM_ERR_STATE, std::string("the ") + h.what_ + " is closed");
            h.users_++;
        }
        Use(Use &&other) : h_(other.h_) { other.h_ = nullptr; }
        Use(const Use &) = delete;
        ~Use()
        {
            if (!h_)
                return;
            const std::lock_guard<std::mutex> lock(h_->mutex_);
            if (--h_->users_ == 0)
                h_->idle_.notify_all();
        }
        T *get() const { return h_->p_; }

    private:
        Handle *h_;
    };

    void open(T *p)
    {
        p_ = p;
        closed_ = false;
    }
    Use use() { return Use(*this); }

    // Keep new calls out; fn(p) unless it was closed.
    template <typename Fn>
    void refuse(Fn fn)
    {
        if (pid_ != getpid())
            return;
        const std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        if (p_)
            fn(p_);
    }

    // With the GIL held. Twice is fine.
    void close()
    {
        if (pid_ != getpid())
            return;
        const pybind11::gil_scoped_release nogil;
        std::unique_lock<std::mutex> lock(mutex_);
        closed_ = true; // from here on nobody enters
        idle_.wait(lock, [this] { return users_ == 0; });
        T *const was = p_;
        p_ = nullptr;
        lock.unlock();
        free_(was);
    }

private:
    const char *what_;
    void (*free_)(T *);
    T *p_ = nullptr; // stays until the calls under way have ended
    bool closed_ = true;
    int users_ = 0;
    const pid_t pid_ = getpid();
    std::mutex mutex_;
    std::condition_variable idle_;
};

#endif

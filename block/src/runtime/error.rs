//! Errors of starting and reaching event loops.

use std::io;

/// Why a loop could not be started, or could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The kernel has no io_uring, or does not let us use it.
    #[error(
        "Cannot set up io_uring for '{name}': it needs Linux 5.6 or later, \
         sysctl kernel.io_uring_disabled=0 (or membership in kernel.io_uring_group), \
         a seccomp profile that allows io_uring, and enough locked memory (ulimit -l) \
         on kernels before 5.12"
    )]
    IoUring {
        /// Name of the loop.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// No epoll or eventfd.
    #[error("Cannot set up the event loop '{name}'")]
    Setup {
        /// Name of the loop.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// No thread.
    #[error("Cannot start iothread '{name}'")]
    Thread {
        /// Name of the iothread.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// This thread has an event loop already.
    #[error("Cannot set up the event loop '{name}': this thread has one already")]
    AlreadyRunning {
        /// Name of the loop that was to be made.
        name: String,
    },
    /// The loop has ended, or ended before the answer came.
    #[error("Iothread '{name}' has stopped")]
    Stopped {
        /// Name of the loop.
        name: String,
    },
    /// What the loop was asked to run panicked.
    #[error("Task on iothread '{name}' panicked: {message}")]
    Panicked {
        /// Name of the loop.
        name: String,
        /// What the panic said.
        message: String,
    },
}

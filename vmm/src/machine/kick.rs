//! Getting a vCPU thread out of `KVM_RUN`: a signal whose handler sets
//! `immediate_exit`, so that a kick that comes just before the thread enters
//! the guest is not lost.

use std::cell::Cell;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of this thread's vCPU; null on all other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal of a kick.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Runs on a vCPU thread, between any two of its instructions.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // A `const` thread-local without a destructor: no allocation, no lock.
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer was set on this very thread by a `Kickable` that
        // is alive (its drop sets null before the mapping can go).
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the signal's handler, once for the process.
pub fn install_handler() -> Result<(), std::io::Error> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            register_signal_handler(kick_signal(), on_kick).map_err(|error| error.errno())
        })
        .map_err(std::io::Error::from_raw_os_error)
}

/// Kicks a vCPU thread: it leaves `KVM_RUN`, or does not stay in it if it is
/// just about to enter. Whatever it shall do then must be stored before.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that was not joined has a valid id, even if it has ended
    // already; and the handler is installed before any vCPU thread starts.
    let error = unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
    // ESRCH only: the thread has ended, and needs no kick.
    debug_assert!(error == 0 || error == libc::ESRCH);
}

/// A vCPU that can be kicked on the thread that made this.
pub struct Kickable {
    vcpu: VcpuFd,
}

impl Kickable {
    /// Takes over a vCPU; the calling thread is the one that will run it.
    pub fn new(mut vcpu: VcpuFd) -> Self {
        let run: *mut kvm_run = vcpu.get_kvm_run();
        // SAFETY: `run` points to the vCPU's mapping, which is as long-lived as
        // `vcpu`; no reference is made, only the field's address taken.
        IMMEDIATE_EXIT.set(unsafe { &raw mut (*run).immediate_exit });
        Self { vcpu }
    }

    /// The vCPU.
    pub fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Makes the next `KVM_RUN` finish a pending access and return `EINTR`
    /// without entering the guest.
    pub fn set_immediate_exit(&mut self) {
        self.store(1);
    }

    /// Takes note of a kick. What it was for must be looked at after this.
    pub fn clear_immediate_exit(&mut self) {
        self.store(0);
    }

    fn store(&mut self, value: u8) {
        let flag = IMMEDIATE_EXIT.get();
        debug_assert!(!flag.is_null());
        if !flag.is_null() {
            // SAFETY: as in `on_kick`; volatile, since the handler and the
            // kernel look at it behind the compiler's back.
            unsafe { flag.write_volatile(value) };
        }
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        // Before the fields: the mapping goes with `vcpu`.
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

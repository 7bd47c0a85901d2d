//! Raw mode of the terminal, and giving it back on every way out of the
//! process: return, panic, and signals that kill.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

/// What stdin's terminal was like before; null while nobody has changed it.
///
/// Own synchronisation: whoever swaps the pointer out restores and (outside
/// signal handlers) frees.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(std::ptr::null_mut());

/// Signals that end the process with no chance to unwind.
const FATAL: [libc::c_int; 6] = [
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGQUIT,
];

/// Raw mode of stdin's terminal, as long as this lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts stdin's terminal into raw mode; `None` if stdin is none.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let mut saved = MaybeUninit::uninit();
        // SAFETY: the kernel fills the structure, or says that it did not.
        let saved = unsafe {
            if libc::tcgetattr(libc::STDIN_FILENO, saved.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            saved.assume_init()
        };
        let mut raw = saved;
        // SAFETY: changes the structure only.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Log lines and the guest's bare newlines stay readable.
        raw.c_oflag |= libc::OPOST | libc::ONLCR;
        install_restorers();
        SAVED.store(Box::into_raw(Box::new(saved)), Ordering::SeqCst);
        if let Err(error) = set(&raw) {
            restore();
            return Err(error);
        }
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn set(termios: &libc::termios) -> io::Result<()> {
    // SAFETY: a complete structure, read only.
    if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, termios) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives the terminal back as it was, once. Async-signal-safe: an atomic swap
/// and `tcsetattr`; the few bytes are not freed.
pub(crate) fn restore() {
    let saved = SAVED.swap(std::ptr::null_mut(), Ordering::SeqCst);
    if !saved.is_null() {
        // SAFETY: made by `Box::into_raw` and never freed; nobody writes it.
        let termios = unsafe { &*saved };
        // A terminal that is gone needs nothing.
        let _ = set(termios);
    }
}

/// Has panics and fatal signals restore the terminal before they do their work.
fn install_restorers() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let inner = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            inner(info);
        }));
        for signal in FATAL {
            // SAFETY: a zeroed `sigaction` is a valid one; the handler does only
            // what is safe in a signal handler.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_fatal as *const () as usize;
                // Once: the handler raises the signal again, with its default.
                action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER | libc::SA_ONSTACK;
                libc::sigaction(signal, &raw const action, std::ptr::null_mut());
            }
        }
    });
}

extern "C" fn on_fatal(signal: libc::c_int) {
    restore();
    // SAFETY: async-signal-safe; the disposition is the default again.
    unsafe { libc::raise(signal) };
}

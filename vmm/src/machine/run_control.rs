//! What the vCPU threads shall do, and whether they have done it.
//!
//! Main asks (run, pause, exit), kicks the threads, and is told on a channel
//! when the last of them is parked. Nothing of KVM is known here.

use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use futures_channel::mpsc::UnboundedSender;

/// What vCPU threads are asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Request {
    /// Run guest code.
    Run,
    /// Park, in a consistent state.
    Pause,
    /// End the thread.
    Exit,
}

/// What a thread does after being parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unparked {
    /// Go on.
    Run,
    /// End.
    Exit,
}

/// All vCPUs are parked; the number is that of the pause they are parked for.
pub type ParkedNotice = u64;

struct State {
    /// Counts pauses, so that a notice for an earlier one is told apart.
    pause: u64,
    /// How many threads are parked.
    parked: usize,
    /// How many threads there are.
    vcpus: usize,
}

/// Shared by main and the vCPU threads.
pub struct RunControl {
    /// What is asked. Own synchronisation: written under `state`'s lock, read
    /// without it after each exit.
    request: AtomicU8,
    /// A leaf lock, held for a few instructions.
    state: Mutex<State>,
    /// Signalled when `request` changes.
    changed: Condvar,
    notices: UnboundedSender<ParkedNotice>,
}

impl RunControl {
    /// Control of `vcpus` threads, which are asked to pause at first. Notices
    /// go to `notices`.
    pub fn new(vcpus: usize, notices: UnboundedSender<ParkedNotice>) -> Arc<Self> {
        Arc::new(Self {
            request: AtomicU8::new(Request::Pause as u8),
            state: Mutex::new(State {
                pause: 0,
                parked: 0,
                vcpus,
            }),
            changed: Condvar::new(),
            notices,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is asked now. Main's store comes before its kick, and a thread
    /// takes note of a kick before it looks here; so no request is missed.
    pub fn requested(&self) -> Request {
        fence(Ordering::SeqCst);
        match self.request.load(Ordering::SeqCst) {
            0 => Request::Run,
            1 => Request::Pause,
            _ => Request::Exit,
        }
    }

    /// Main: asks the threads to run.
    pub fn request_run(&self) {
        let state = self.lock();
        self.request.store(Request::Run as u8, Ordering::SeqCst);
        drop(state);
        self.changed.notify_all();
    }

    /// Main: asks the threads to park. `None` if all are parked already, else
    /// the number of the notice to wait for. The threads have to be kicked.
    #[must_use]
    pub fn request_pause(&self) -> Option<ParkedNotice> {
        let mut state = self.lock();
        self.request.store(Request::Pause as u8, Ordering::SeqCst);
        state.pause += 1;
        (state.parked < state.vcpus).then_some(state.pause)
    }

    /// Main: asks the threads to end. They have to be kicked, and joined.
    pub fn request_exit(&self) {
        let state = self.lock();
        self.request.store(Request::Exit as u8, Ordering::SeqCst);
        drop(state);
        self.changed.notify_all();
    }

    /// vCPU thread: parks until it is asked to run or to end.
    pub fn park(&self) -> Unparked {
        self.park_while(Request::Pause)
    }

    /// vCPU thread: parks until it is asked to end, whatever else is asked.
    pub fn park_for_good(&self) {
        self.park_while(Request::Run);
    }

    /// Parks while `patience` or something less final is asked.
    fn park_while(&self, patience: Request) -> Unparked {
        let mut state = self.lock();
        state.parked += 1;
        if state.parked == state.vcpus {
            // Fails only when main is not interested any more.
            let _ = self.notices.unbounded_send(state.pause);
        }
        loop {
            match self.requested() {
                Request::Exit => {
                    state.parked -= 1;
                    return Unparked::Exit;
                }
                Request::Run if patience == Request::Pause => {
                    state.parked -= 1;
                    return Unparked::Run;
                }
                Request::Run | Request::Pause => {}
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_channel::mpsc;
    use futures_util::StreamExt;
    use std::thread;

    /// A thread that runs guest "code" until asked for something else.
    fn vcpu(control: &Arc<RunControl>) -> thread::JoinHandle<u32> {
        let control = Arc::clone(control);
        thread::spawn(move || {
            let mut parked = 0;
            loop {
                match control.requested() {
                    Request::Run => thread::yield_now(),
                    Request::Pause => {
                        parked += 1;
                        if control.park() == Unparked::Exit {
                            return parked;
                        }
                    }
                    Request::Exit => return parked,
                }
            }
        })
    }

    #[test]
    fn a_pause_is_reported_once_all_vcpus_are_parked() {
        let (sender, notices) = mpsc::unbounded();
        let mut notices = futures_executor_stream(notices);
        let control = RunControl::new(2, sender);
        let threads = [vcpu(&control), vcpu(&control)];
        assert_eq!(notices.next(), Some(0), "they start parked");
        for round in 1..=100 {
            control.request_run();
            if let Some(notice) = control.request_pause() {
                assert_eq!(notice, round);
                while notices.next().unwrap() != notice {}
            }
        }
        control.request_exit();
        for thread in threads {
            assert!(thread.join().unwrap() >= 1);
        }
    }

    #[test]
    fn a_dead_vcpu_stays_parked_when_the_others_run() {
        let (sender, notices) = mpsc::unbounded();
        let mut notices = futures_executor_stream(notices);
        let control = RunControl::new(1, sender);
        let thread = thread::spawn({
            let control = Arc::clone(&control);
            move || control.park_for_good()
        });
        assert_eq!(notices.next(), Some(0));
        control.request_run();
        assert!(control.request_pause().is_none(), "it is still parked");
        control.request_exit();
        thread.join().unwrap();
    }

    /// A channel as a blocking iterator.
    fn futures_executor_stream(
        mut receiver: mpsc::UnboundedReceiver<ParkedNotice>,
    ) -> impl Iterator<Item = ParkedNotice> {
        let event_loop = block::runtime::EventLoop::new("test").unwrap();
        std::iter::from_fn(move || event_loop.block_on(receiver.next()))
    }
}

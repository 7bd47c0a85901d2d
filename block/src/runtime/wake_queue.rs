//! The queue by which other threads reach a loop.
//!
//! What does not live here: how a sleeping loop is rung (an eventfd, by the
//! caller). So the protocol can be model-checked by itself.

use crate::sync::atomic::{AtomicU8, Ordering};
use crate::sync::{Mutex, lock};

/// The loop is running and looks at the queue before it sleeps.
const AWAKE: u8 = 0;
/// The loop sleeps, or is about to: it must be rung.
const ASLEEP: u8 = 1;

/// A queue with many producers and one consumer that may sleep.
///
/// No wake-up is lost: a producer queues first and looks at the state second; the
/// consumer says that it sleeps first and looks at the queue second. Wake-ups
/// are coalesced: only the producer that finds the consumer asleep rings.
pub(super) struct WakeQueue<T> {
    /// `None` once closed. A leaf lock, held for a few instructions.
    items: Mutex<Option<Vec<T>>>,
    /// `AWAKE` or `ASLEEP`.
    state: AtomicU8,
}

impl<T> WakeQueue<T> {
    pub(super) fn new() -> Self {
        Self {
            items: Mutex::new(Some(Vec::new())),
            state: AtomicU8::new(AWAKE),
        }
    }

    /// Queues `item`; `Ok(true)`: the caller must ring the consumer. Gives the
    /// item back if the queue has been closed.
    pub(super) fn push(&self, item: T) -> Result<bool, T> {
        {
            let mut items = lock(&self.items);
            match items.as_mut() {
                Some(items) => items.push(item),
                None => return Err(item),
            }
        }
        Ok(self.state.swap(AWAKE, Ordering::SeqCst) == ASLEEP)
    }

    /// Consumer: moves everything that is queued to the end of `into`.
    pub(super) fn take(&self, into: &mut Vec<T>) {
        if let Some(items) = lock(&self.items).as_mut() {
            into.append(items);
        }
    }

    /// Consumer: says that it is going to sleep. `false`: something has been
    /// queued meanwhile, and it must not.
    pub(super) fn prepare_sleep(&self) -> bool {
        self.state.store(ASLEEP, Ordering::SeqCst);
        let empty = lock(&self.items).as_ref().is_none_or(Vec::is_empty);
        if !empty {
            self.awake();
        }
        empty
    }

    /// Consumer: is awake again, whatever woke it.
    pub(super) fn awake(&self) {
        self.state.store(AWAKE, Ordering::SeqCst);
    }

    /// Consumer: closes the queue and returns what was in it.
    pub(super) fn close(&self) -> Vec<T> {
        lock(&self.items).take().unwrap_or_default()
    }
}

#[cfg(all(test, shuttle))]
mod tests {
    use super::*;
    use shuttle::sync::{Arc, Condvar};
    use shuttle::thread;

    /// Stands for the eventfd.
    #[derive(Default)]
    struct Bell {
        rung: Mutex<bool>,
        heard: Condvar,
    }

    fn producers_and_a_sleeping_consumer() {
        const PRODUCERS: usize = 3;
        const EACH: usize = 2;
        let queue = Arc::new(WakeQueue::new());
        let bell = Arc::new(Bell::default());
        let producers: Vec<_> = (0..PRODUCERS)
            .map(|p| {
                let (queue, bell) = (Arc::clone(&queue), Arc::clone(&bell));
                thread::spawn(move || {
                    for i in 0..EACH {
                        if queue.push(p * EACH + i).expect("open") {
                            *lock(&bell.rung) = true;
                            bell.heard.notify_one();
                        }
                    }
                })
            })
            .collect();
        let mut got = Vec::new();
        while got.len() < PRODUCERS * EACH {
            queue.take(&mut got);
            if got.len() < PRODUCERS * EACH && queue.prepare_sleep() {
                // A lost wake-up is a deadlock here, which shuttle reports.
                let mut rung = lock(&bell.rung);
                while !*rung {
                    rung = bell.heard.wait(rung).unwrap();
                }
                *rung = false;
                drop(rung);
                queue.awake();
            }
        }
        for producer in producers {
            producer.join().unwrap();
        }
        got.sort_unstable();
        assert_eq!(got, (0..PRODUCERS * EACH).collect::<Vec<_>>());
    }

    #[test]
    fn no_wake_up_is_lost_in_random_schedules() {
        shuttle::check_random(producers_and_a_sleeping_consumer, 3_000);
    }

    #[test]
    fn no_wake_up_is_lost_in_schedules_with_few_preemptions() {
        shuttle::check_pct(producers_and_a_sleeping_consumer, 3_000, 3);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_producer_after_sleep_has_to_ring() {
        let queue = WakeQueue::new();
        assert_eq!(queue.push(1), Ok(false));
        assert!(!queue.prepare_sleep());
        let mut got = Vec::new();
        queue.take(&mut got);
        assert_eq!(got, [1]);
        assert!(queue.prepare_sleep());
        assert_eq!(queue.push(2), Ok(true));
        assert_eq!(queue.push(3), Ok(false));
    }

    #[test]
    fn a_closed_queue_gives_items_back() {
        let queue = WakeQueue::new();
        assert_eq!(queue.push(1), Ok(false));
        assert_eq!(queue.close(), [1]);
        assert_eq!(queue.push(2), Err(2));
    }
}

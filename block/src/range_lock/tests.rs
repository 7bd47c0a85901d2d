use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc as StdArc, Barrier};
use std::task::{Wake, Waker};

use super::*;

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: StdArc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Polls once with a waker that counts.
fn poll<F: Future + Unpin>(future: &mut F, count: &StdArc<Count>) -> Option<F::Output> {
    let waker = Waker::from(StdArc::clone(count));
    match Pin::new(future).poll(&mut Context::from_waker(&waker)) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

#[test]
fn overlapping_ranges_wait_and_others_do_not() {
    let lock = RangeLock::new();
    let count = StdArc::<Count>::default();
    let first = poll(&mut lock.lock(0..100), &count).unwrap();
    let beside = poll(&mut lock.lock(100..200), &count).unwrap();
    let mut waiting = lock.lock(50..150);
    assert!(poll(&mut waiting, &count).is_none());
    drop(first);
    assert!(poll(&mut waiting, &count).is_none(), "one is still held");
    drop(beside);
    assert_eq!(count.0.load(Ordering::SeqCst), 1);
    drop(poll(&mut waiting, &count).unwrap());
    assert!(lock.try_lock(0..1000).is_some());
}

#[test]
fn who_asked_first_is_served_first_and_is_not_overtaken() {
    let lock = RangeLock::new();
    let count = StdArc::<Count>::default();
    let held = lock.try_lock(0..10).unwrap();
    let mut second = lock.lock(5..20);
    let mut third = lock.lock(15..30);
    // Free as far as holders go, but the second asked for part of it before.
    assert!(poll(&mut third, &count).is_none());
    assert!(lock.try_lock(18..19).is_none());
    assert!(poll(&mut second, &count).is_none());
    drop(held);
    let second = poll(&mut second, &count).unwrap();
    assert!(poll(&mut third, &count).is_none());
    drop(second);
    assert!(poll(&mut third, &count).is_some());
}

#[test]
fn a_waiter_that_gives_up_lets_those_behind_it_go_on() {
    let lock = RangeLock::new();
    let count = StdArc::<Count>::default();
    let held = lock.try_lock(0..10).unwrap();
    let mut gives_up = lock.lock(5..20);
    let mut behind = lock.lock(15..30);
    assert!(poll(&mut gives_up, &count).is_none());
    assert!(poll(&mut behind, &count).is_none());
    drop(gives_up);
    assert_eq!(count.0.load(Ordering::SeqCst), 1);
    assert!(poll(&mut behind, &count).is_some());
    // Granted but never polled again.
    let unpolled = lock.lock(0..5);
    drop(held);
    drop(unpolled);
    assert!(lock.try_lock(0..10).is_some());
}

#[test]
fn empty_ranges_wait_for_nobody() {
    let lock = RangeLock::new();
    let _all = lock.try_lock(0..u64::MAX).unwrap();
    assert!(lock.try_lock(5..5).is_some());
}

#[test]
fn threads_that_count_under_the_lock_lose_nothing() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 500;
    let lock = RangeLock::new();
    let inside = StdArc::new(AtomicUsize::new(0));
    let barrier = StdArc::new(Barrier::new(THREADS));
    let threads: Vec<_> = (0..THREADS)
        .map(|i| {
            let (lock, inside) = (lock.clone(), StdArc::clone(&inside));
            let barrier = StdArc::clone(&barrier);
            std::thread::spawn(move || {
                barrier.wait();
                for round in 0..ROUNDS {
                    let start = ((i + round) % 3) as u64;
                    // All of these contain byte 3.
                    let guard = block_on(lock.lock(start..start + 4));
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(guard);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: StdArc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(StdArc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

//! The loop as its users see it.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use futures_util::future::{join_all, poll_fn};
use futures_util::{FutureExt, StreamExt};

use super::*;

fn main_loop() -> EventLoop {
    EventLoop::new("test").expect("event loop")
}

#[test]
fn block_on_gives_the_result_and_tasks_run_beside_it() {
    let main = main_loop();
    let log = Rc::new(RefCell::new(Vec::new()));
    let result = main.block_on(async {
        let task = spawn_local({
            let log = Rc::clone(&log);
            async move {
                log.borrow_mut().push("task");
                7
            }
        });
        log.borrow_mut().push("root");
        task.await + 1
    });
    assert_eq!(result, 8);
    assert_eq!(*log.borrow(), ["root", "task"]);
}

#[test]
fn a_thread_has_one_loop_at_a_time() {
    let main = main_loop();
    assert!(matches!(
        EventLoop::new("second"),
        Err(RuntimeError::AlreadyRunning { .. })
    ));
    assert!(current().is_some_and(|handle| handle.is_current()));
    drop(main);
    assert!(current().is_none());
    drop(EventLoop::new("third").expect("event loop"));
}

#[test]
fn calls_to_an_iothread_run_there_in_order() {
    let main = main_loop();
    let iothread = Iothread::spawn("io0").expect("iothread");
    let handle = iothread.handle().clone();
    assert_ne!(handle.thread_id(), main.handle().thread_id());
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    for i in 0..100 {
        let order = Arc::clone(&order);
        handle.spawn(move || async move { order.lock().unwrap().push(i) });
    }
    let there = handle.clone();
    let name = main.block_on(handle.call(move || async move {
        assert!(there.is_current());
        current().map(|handle| handle.name().to_owned())
    }));
    assert_eq!(name.unwrap().as_deref(), Some("io0"));
    assert_eq!(*order.lock().unwrap(), (0..100).collect::<Vec<_>>());
}

#[test]
fn many_remote_wake_ups_under_load_all_arrive() {
    const THREADS: usize = 4;
    const EACH: usize = 5_000;
    let main = main_loop();
    let (sender, mut receiver) = futures_channel::mpsc::unbounded();
    let threads: Vec<_> = (0..THREADS)
        .map(|t| {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for i in 0..EACH {
                    sender.unbounded_send(t * EACH + i).unwrap();
                    if i % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    drop(sender);
    let mut got = main.block_on(async {
        // In a task, so that each wake-up is of a runnable.
        spawn_local(async move {
            let mut got = Vec::new();
            while let Some(i) = receiver.next().await {
                got.push(i);
            }
            got
        })
        .await
    });
    threads.into_iter().for_each(|t| t.join().unwrap());
    got.sort_unstable();
    assert_eq!(got, (0..THREADS * EACH).collect::<Vec<_>>());
}

#[test]
fn two_iothreads_play_ping_pong() {
    let a = Iothread::spawn("a").expect("iothread");
    let b = Iothread::spawn("b").expect("iothread");
    let (ha, hb) = (a.handle().clone(), b.handle().clone());
    let main = main_loop();
    let count = main
        .block_on(ha.call(move || async move {
            let mut count = 0;
            for _ in 0..2_000 {
                count += hb.call(|| async { 1 }).await.unwrap();
            }
            count
        }))
        .unwrap();
    assert_eq!(count, 2_000);
}

#[test]
fn timers_never_fire_early() {
    let main = main_loop();
    main.block_on(join_all([7u64, 1, 4, 0, 2].map(|millis| async move {
        let start = Instant::now();
        sleep(Duration::from_millis(millis)).await;
        assert!(start.elapsed() >= Duration::from_millis(millis));
    })));
}

#[test]
fn a_dropped_sleep_leaves_no_timer() {
    let main = main_loop();
    main.block_on(async {
        let mut long = Box::pin(sleep(Duration::from_secs(3600)));
        assert!(long.as_mut().now_or_never().is_none());
        let core = event_loop::LoopCore::current();
        assert!(core.timers.borrow().next().is_some());
        drop(long);
        assert!(core.timers.borrow().next().is_none());
    });
}

#[test]
fn an_idle_loop_sleeps() {
    let main = main_loop();
    main.block_on(async {
        // Something of everything that could keep it awake.
        let (a, _b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        let fd = AsyncFd::new(a).unwrap();
        let _reader = spawn_local(async move {
            let mut byte = [0];
            let _ = fd.io(Interest::Readable, |mut s| s.read(&mut byte)).await;
        });
        sleep(Duration::from_millis(1)).await;
    });
    let before = main.polls();
    main.block_on(sleep(Duration::from_millis(50)));
    assert!(main.polls() - before <= 4, "{}", main.polls() - before);
}

#[test]
fn a_cancelled_task_drops_its_future_before_cancel_returns() {
    struct Flag(Rc<Cell<bool>>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    let main = main_loop();
    main.block_on(async {
        let dropped = Rc::new(Cell::new(false));
        let flag = Flag(Rc::clone(&dropped));
        let task = spawn_local(async move {
            let _flag = flag;
            std::future::pending::<()>().await;
        });
        yield_now().await;
        assert!(!dropped.get());
        assert_eq!(task.cancel().await, None);
        assert!(dropped.get());
        let task = spawn_local(async { 3 });
        yield_now().await;
        yield_now().await;
        assert!(task.is_finished());
        assert_eq!(task.cancel().await, Some(3));
    });
}

#[test]
fn a_dropped_handle_lets_the_task_run_on() {
    let main = main_loop();
    let (sender, receiver) = oneshot::channel();
    main.block_on(async {
        drop(spawn_local(async move {
            yield_now().await;
            sender.send(5).unwrap();
        }));
        assert_eq!(receiver.await, Ok(5));
    });
}

#[test]
fn a_panic_reaches_who_awaits_it_and_harms_nobody_else() {
    let iothread = Iothread::spawn("io0").expect("iothread");
    let handle = iothread.handle().clone();
    let main = main_loop();
    handle.spawn(|| async { panic!("detached") });
    handle.spawn(|| -> std::future::Ready<()> { panic!("before the future") });
    let error = main
        .block_on(handle.call(|| async {
            if true {
                panic!("called {}", 1);
            }
        }))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "Task on iothread 'io0' panicked: called 1"
    );
    let caught = main
        .block_on(handle.call(|| async {
            let task = spawn_local(async { panic!("local") });
            std::panic::AssertUnwindSafe(task).catch_unwind().await
        }))
        .unwrap();
    assert_eq!(*caught.unwrap_err().downcast::<&str>().unwrap(), "local");
    assert_eq!(main.block_on(handle.call(|| async { 1 })).unwrap(), 1);
}

#[test]
fn a_stopped_iothread_refuses_calls_and_has_dropped_its_tasks() {
    let iothread = Iothread::spawn("io0").expect("iothread");
    let handle = iothread.handle().clone();
    let alive = Arc::new(());
    let held = Arc::clone(&alive);
    handle.spawn(move || async move {
        let _held = held;
        std::future::pending::<()>().await;
    });
    let main = main_loop();
    // Waits on the iothread when that stops.
    let pending = handle.clone();
    let (entered, wait_entered) = oneshot::channel();
    let waiting = spawn_local(async move {
        pending
            .call(|| async {
                entered.send(()).unwrap();
                std::future::pending::<()>().await;
            })
            .await
    });
    main.block_on(wait_entered).unwrap();
    iothread.stop();
    assert_eq!(Arc::strong_count(&alive), 1);
    assert!(matches!(
        main.block_on(waiting),
        Err(RuntimeError::Stopped { .. })
    ));
    let error = main.block_on(handle.call(|| async {})).unwrap_err();
    assert_eq!(error.to_string(), "Iothread 'io0' has stopped");
}

#[test]
fn stop_races_with_wake_ups_from_other_threads() {
    for _ in 0..50 {
        let iothread = Iothread::spawn("io0").expect("iothread");
        let (sender, receiver) = mpsc::channel();
        for _ in 0..8 {
            let sender = sender.clone();
            iothread.handle().spawn(move || {
                poll_fn(move |cx| {
                    // Nobody listens any more once the wakers were taken.
                    let _ = sender.send(cx.waker().clone());
                    std::task::Poll::Pending
                })
            });
        }
        drop(sender);
        let wakers: Vec<_> = (0..8).map(|_| receiver.recv().unwrap()).collect();
        let storm = std::thread::spawn(move || {
            for _ in 0..200 {
                wakers.iter().for_each(std::task::Waker::wake_by_ref);
            }
            // The last references die on this thread.
            drop(wakers);
        });
        iothread.stop();
        storm.join().unwrap();
    }
}

#[test]
fn dropping_a_loop_drops_tasks_that_spawn_while_they_are_dropped() {
    struct SpawnsOnDrop(Arc<AtomicUsize>);
    impl Drop for SpawnsOnDrop {
        fn drop(&mut self) {
            if self.0.fetch_add(1, Ordering::Relaxed) < 3 {
                let next = SpawnsOnDrop(Arc::clone(&self.0));
                spawn_local(async move {
                    let _next = next;
                    std::future::pending::<()>().await;
                })
                .detach();
            }
        }
    }
    let count = Arc::new(AtomicUsize::new(0));
    let main = main_loop();
    let first = SpawnsOnDrop(Arc::clone(&count));
    main.block_on(async move {
        spawn_local(async move {
            let _first = first;
            std::future::pending::<()>().await;
        })
        .detach();
        yield_now().await;
    });
    drop(main);
    assert_eq!(count.load(Ordering::Relaxed), 4);
}

#[test]
fn async_fd_carries_more_than_a_socket_buffer_both_ways() {
    const BYTES: usize = 1 << 20;
    let main = main_loop();
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    main.block_on(async move {
        let a = Rc::new(AsyncFd::new(a).unwrap());
        let b = AsyncFd::new(b).unwrap();
        let echo = spawn_local(async move {
            let mut buffer = [0; 5000];
            loop {
                let n = b
                    .io(Interest::Readable, |mut s| s.read(&mut buffer))
                    .await
                    .unwrap();
                if n == 0 {
                    break;
                }
                let mut done = 0;
                while done < n {
                    done += b
                        .io(Interest::Writable, |mut s| s.write(&buffer[done..n]))
                        .await
                        .unwrap();
                }
            }
        });
        let writer = spawn_local({
            let a = Rc::clone(&a);
            async move {
                let data: Vec<u8> = (0..BYTES).map(|i| (i % 251) as u8).collect();
                let mut done = 0;
                while done < BYTES {
                    done += a
                        .io(Interest::Writable, |mut s| s.write(&data[done..]))
                        .await
                        .unwrap();
                }
            }
        });
        let mut got = Vec::new();
        let mut buffer = [0; 7000];
        while got.len() < BYTES {
            let n = a
                .io(Interest::Readable, |mut s| s.read(&mut buffer))
                .await
                .unwrap();
            got.extend_from_slice(&buffer[..n]);
        }
        writer.await;
        assert!(got.iter().enumerate().all(|(i, b)| *b == (i % 251) as u8));
        a.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
        echo.await;
    });
}

#[test]
fn a_dropped_wait_on_an_fd_leaves_the_other_waiter_its_wake_up() {
    let main = main_loop();
    let (a, mut b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    main.block_on(async {
        let a = AsyncFd::new(a).unwrap();
        let read = || {
            Box::pin(a.io(Interest::Readable, |mut s| {
                let mut byte = [0];
                s.read(&mut byte)
            }))
        };
        let mut first = read();
        assert!(first.as_mut().now_or_never().is_none());
        let mut second = read();
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        b.write_all(&[1]).unwrap();
        assert_eq!(second.await.unwrap(), 1);
    });
}

#[test]
fn a_regular_file_is_refused_by_async_fd() {
    let main = main_loop();
    let file = tempfile::tempfile().unwrap();
    let error = main
        .block_on(async { AsyncFd::new(file).err() })
        .expect("refused");
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
}

#[test]
fn unblock_runs_elsewhere_while_the_loop_goes_on() {
    let main = main_loop();
    let (release, wait) = mpsc::channel::<()>();
    main.block_on(async {
        let here = std::thread::current().id();
        let blocked = spawn_local(unblock(move || {
            wait.recv().unwrap();
            std::thread::current().id()
        }));
        // The loop turns while the other thread blocks.
        sleep(Duration::from_millis(1)).await;
        assert!(!blocked.is_finished());
        release.send(()).unwrap();
        assert_ne!(blocked.await, here);
    });
}

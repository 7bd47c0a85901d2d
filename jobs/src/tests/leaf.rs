//! The job mutex is a leaf: whatever else is taken, begun, woken or awaited under it
//! panics in debug builds.
#![cfg(debug_assertions)]

use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use block::test_storage::TestStorage;
use block::{
    AlignedBuffer, BlockdevOptions, DriverOptions, FileOptions, NodeOptions, Permissions,
    RangeLock, runtime,
};
use futures_util::FutureExt as _;
use futures_util::future::poll_fn;

use super::{Stage, on_main, steady};
use crate::test_support::spec;
use crate::{CopyMode, JobChange, JobDriver, JobKey, Jobs};

/// Jobs without a main task, and a job that was only created.
fn alone(test: impl FnOnce(&Jobs, JobKey)) {
    on_main(|stage| async move {
        let dynamic: Arc<dyn JobDriver> = steady();
        let (key, created) = stage.jobs.lock().create(spec("j0"), &dynamic).unwrap();
        stage.jobs.run(created);
        test(&stage.jobs, key);
    });
}

#[test]
#[should_panic(expected = "effects were run while this thread holds the job mutex")]
fn effects_cannot_be_run_under_the_job_mutex() {
    alone(|jobs, key| {
        let mut guard = jobs.lock();
        let effects = guard.start(key);
        jobs.run(effects);
    });
}

#[test]
#[should_panic(expected = "were dropped instead of run")]
fn effects_cannot_be_dropped() {
    alone(|jobs, key| {
        let effects = jobs.lock().start(key);
        drop(effects);
    });
}

#[test]
#[should_panic(expected = "the job mutex was taken while this thread holds the job mutex")]
fn the_job_mutex_cannot_be_taken_twice() {
    alone(|jobs, _| {
        let _guard = jobs.lock();
        jobs.query();
    });
}

#[test]
#[should_panic(expected = "a hook was called while this thread holds the job mutex")]
fn a_change_cannot_be_applied_under_the_job_mutex() {
    alone(|jobs, key| {
        let mut guard = jobs.lock();
        let request = guard.change(key, Some(JobChange::CopyMode(CopyMode::Background)));
        request.unwrap().apply().ok();
    });
}

#[test]
#[should_panic(expected = "events were delivered while this thread holds the job mutex")]
fn events_cannot_be_delivered_under_the_job_mutex() {
    on_main(|stage| async move {
        let guard = stage.jobs.lock();
        stage.jobs.flush_events();
        drop(guard);
    });
}

/// A node, and a backend on it that is told of nothing.
fn attached(stage: &Stage) -> (Arc<block::Node>, Arc<block::Backend>) {
    let storage = TestStorage::new(1 << 20);
    let graph = &stage.graph;
    let node = graph
        .add_node(Some("disk"), storage.driver(), NodeOptions::default())
        .unwrap();
    let backend = graph.attach("", &node, Permissions::IDLE, None).unwrap();
    (node, backend)
}

#[test]
#[should_panic(
    expected = "a lock of the block layer was taken while this thread holds the job mutex"
)]
fn no_other_lock_can_be_taken_under_the_job_mutex() {
    alone(|jobs, _| {
        let other = RangeLock::new();
        let _guard = jobs.lock();
        other.try_lock(0..1);
    });
}

#[test]
#[should_panic(expected = "a task awaited while this thread holds the job mutex")]
#[expect(clippy::await_holding_invalid_type, reason = "that is what is tested")]
fn nothing_can_be_awaited_under_the_job_mutex() {
    on_main(|stage| async move {
        let guard = stage.jobs.lock();
        poll_fn(|_| Poll::<()>::Pending).await;
        drop(guard);
    });
}

#[test]
#[should_panic(expected = "a task awaited while this thread holds the job mutex")]
#[expect(clippy::await_holding_invalid_type, reason = "that is what is tested")]
fn a_task_that_awaits_under_the_job_mutex_is_found_too() {
    on_main(|stage| async move {
        let jobs = stage.jobs.clone();
        let task = runtime::spawn_local(async move {
            let guard = jobs.lock();
            poll_fn(|_| Poll::<()>::Pending).await;
            drop(guard);
        });
        task.await;
    });
}

#[test]
#[should_panic(expected = "the graph was looked at while this thread holds the job mutex")]
fn the_graph_cannot_be_entered_under_the_job_mutex() {
    on_main(|stage| async move {
        let _guard = stage.jobs.lock();
        stage.graph.find("disk").ok();
    });
}

#[test]
#[should_panic(expected = "a drained section was begun while this thread holds the job mutex")]
fn no_drained_section_can_begin_under_the_job_mutex() {
    on_main(|stage| async move {
        let (node, _backend) = attached(&stage);
        let _guard = stage.jobs.lock();
        stage.graph.drain(&node, &[]).now_or_never();
    });
}

#[test]
#[should_panic(expected = "a request was begun while this thread holds the job mutex")]
fn no_request_can_begin_under_the_job_mutex() {
    on_main(|stage| async move {
        let (_node, backend) = attached(&stage);
        let _guard = stage.jobs.lock();
        backend.try_enter();
    });
}

#[test]
#[should_panic(expected = "a task was woken while this thread holds the job mutex")]
fn nobody_can_be_woken_under_the_job_mutex() {
    on_main(|stage| async move {
        let waker = Arc::new(Mutex::new(None::<Waker>));
        let there = Arc::clone(&waker);
        let task = runtime::spawn_local(poll_fn(move |cx| {
            *there.lock().unwrap() = Some(cx.waker().clone());
            Poll::<()>::Pending
        }));
        while waker.lock().unwrap().is_none() {
            runtime::yield_now().await;
        }
        let waker = waker.lock().unwrap().take().unwrap();
        {
            let _guard = stage.jobs.lock();
            waker.wake();
        }
        task.cancel().await;
    });
}

#[test]
#[should_panic(expected = "I/O was begun while this thread holds the job mutex")]
fn no_io_can_begin_under_the_job_mutex() {
    on_main(|stage| async move {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let options = BlockdevOptions {
            node_name: Some("disk".to_owned()),
            ..BlockdevOptions::new(DriverOptions::File(FileOptions {
                filename: file.path().to_owned(),
                locking: None,
                host_device: false,
                bitmap_file: None,
            }))
        };
        let node = stage.graph.blockdev_add(options).await.unwrap();
        let buffer = AlignedBuffer::new(512);
        let _guard = stage.jobs.lock();
        node.read(0, buffer.io_vec(512)).now_or_never();
    });
}

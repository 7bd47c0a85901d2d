//! Rules by themselves, files of rules, and requests that meet them.

use std::time::Duration;

use super::config::parse;
use super::rules::Rules;
use super::*;
use crate::drivers::raw::RawDriver;
use crate::node::NodeOptions;
use crate::options::{BlockdevRef, DiscardMode, RawOptions};
use crate::runtime::EventLoop;
use crate::test_storage::{Ended, TestStorage};

fn rule(event: DebugEvent) -> InjectError {
    InjectError {
        event,
        state: 0,
        op: None,
        errno: libc::EIO,
        sector: None,
        once: false,
        immediately: true,
        delay: Duration::ZERO,
    }
}

fn no_options() -> BlkdebugOptions {
    BlkdebugOptions {
        image: BlockdevRef::Name("below".into()),
        config: None,
        align: 0,
        max_transfer: 0,
        opt_write_zero: 0,
        max_write_zero: 0,
        opt_discard: 0,
        max_discard: 0,
        inject_error: Vec::new(),
        set_state: Vec::new(),
        take_child_perms: Perm::NONE,
        unshare_child_perms: Perm::NONE,
    }
}

fn errno(rules: &mut Rules, op: IoOp, offset: u64, len: u64) -> Option<i32> {
    rules.hit(op, offset, len).and_then(|hit| hit.errno)
}

#[test]
fn a_rule_without_event_acts_from_the_start_on_all_but_questions() {
    let mut rules = Rules::new(vec![rule(DebugEvent::NONE)], Vec::new());
    for op in [
        IoOp::Read,
        IoOp::Write,
        IoOp::WriteZeroes,
        IoOp::Discard,
        IoOp::Flush,
    ] {
        assert_eq!(errno(&mut rules, op, 0, 512), Some(libc::EIO), "{op}");
    }
    assert_eq!(errno(&mut rules, IoOp::BlockStatus, 0, 512), None);
    let mut rules = Rules::new(
        vec![InjectError {
            op: Some(IoOp::BlockStatus),
            errno: 5000,
            ..rule(DebugEvent::NONE)
        }],
        Vec::new(),
    );
    assert_eq!(errno(&mut rules, IoOp::BlockStatus, 0, 512), Some(5000));
    assert_eq!(errno(&mut rules, IoOp::Read, 0, 512), None);
}

#[test]
fn a_sector_is_hit_by_requests_that_touch_it_and_once_means_once() {
    let once = InjectError {
        sector: Some(8),
        once: true,
        ..rule(DebugEvent::NONE)
    };
    let never = InjectError {
        sector: Some(u64::MAX),
        ..rule(DebugEvent::NONE)
    };
    let mut rules = Rules::new(vec![once, never], Vec::new());
    assert_eq!(errno(&mut rules, IoOp::Read, 0, 4096), None);
    assert_eq!(errno(&mut rules, IoOp::Read, 4608, 4096), None);
    assert_eq!(errno(&mut rules, IoOp::Flush, 0, 0), None);
    assert_eq!(errno(&mut rules, IoOp::Read, 3584, 1024), Some(libc::EIO));
    assert_eq!(errno(&mut rules, IoOp::Read, 3584, 1024), None);
    rules.happened(DebugEvent::NONE);
    assert_eq!(errno(&mut rules, IoOp::Read, 0, u64::MAX), None);
}

#[test]
fn an_event_replaces_what_was_active_and_the_state_follows_it() {
    let of_writes = InjectError {
        errno: 1,
        state: 1,
        ..rule(DebugEvent::WRITE_AIO)
    };
    let of_reads = InjectError {
        errno: 2,
        state: 2,
        ..rule(DebugEvent::READ_AIO)
    };
    let later = InjectError {
        errno: 3,
        state: 2,
        ..rule(DebugEvent::READ_AIO)
    };
    let to_two = SetState {
        event: DebugEvent::WRITE_AIO,
        state: 1,
        new_state: 2,
    };
    let not_taken = SetState {
        new_state: 9,
        ..to_two.clone()
    };
    let states = vec![to_two, not_taken];
    let mut rules = Rules::new(vec![of_writes, of_reads, later], states);
    rules.happened(DebugEvent::READ_AIO);
    assert_eq!(errno(&mut rules, IoOp::Read, 0, 512), None);
    // In the state that the event ends.
    rules.happened(DebugEvent::WRITE_AIO);
    assert_eq!(errno(&mut rules, IoOp::Read, 0, 512), Some(1));
    rules.happened(DebugEvent::WRITE_AIO);
    assert_eq!(errno(&mut rules, IoOp::Read, 0, 512), Some(1));
    rules.happened(DebugEvent::READ_AIO);
    assert_eq!(errno(&mut rules, IoOp::Read, 0, 512), Some(2));
}

#[test]
fn files_of_rules_are_read_as_qemu_reads_them() {
    let rules = parse(
        "# a comment\n\n[inject-error]\n  event = \"read_aio\" # why\n errno = \"28\"\n\
         sector = \"0x10\"\nonce = \"on\"\nstate=\"3\"\niotype = \"flush\"\n\
         [set-state \"name\"]\nevent = \"none\"\nevent = \"pwritev\"\nnew_state = \"2\"\n\
         [inject-error]\nevent = \"write_aio\"\nsector = \"-1\"\ndelay-ns = \"5\"",
    )
    .unwrap();
    let first = InjectError {
        errno: 28,
        sector: Some(16),
        once: true,
        state: 3,
        op: Some(IoOp::Flush),
        immediately: false,
        ..rule(DebugEvent::READ_AIO)
    };
    let second = InjectError {
        immediately: false,
        delay: Duration::from_nanos(5),
        ..rule(DebugEvent::WRITE_AIO)
    };
    assert_eq!(rules.errors, [first, second]);
    let state = SetState {
        event: DebugEvent::PWRITEV,
        state: 0,
        new_state: 2,
    };
    assert_eq!(rules.states, [state]);

    let group = "[inject-error]\nevent = \"read_aio\"\n";
    for (text, message) in [
        ("[inject-error]", "Missing event name for rule"),
        ("[inject-error]\nevent=\"x\"", "invalid parameter value: x"),
        ("[nope]", "There is no option group 'nope'"),
        ("[inject-error", "There is no option group 'inject-error'"),
        ("event = \"none\"", "no group defined"),
        (
            &format!("{group}errno = \"x\""),
            "Parameter 'errno' expects a number",
        ),
        (
            &format!("{group}once = \"x\""),
            "Parameter 'once' expects 'on' or 'off'",
        ),
        (
            &format!("{group}iotype = \"x\""),
            "invalid parameter value: x",
        ),
        (&format!("{group}nope = \"x\""), "Invalid parameter 'nope'"),
        (&format!("{group}once"), "parse error"),
        (&format!("{group}errno = \"5"), "parse error"),
    ] {
        assert_eq!(parse(text).unwrap_err().to_string(), message, "{text}");
    }
    for bytes in [&b"\xff"[..], &vec![b'#'; 2 << 20]] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        assert!(super::config::read(file.path()).is_err());
    }
    let missing = super::config::read(Path::new("/nonexistent/rules")).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "Could not read blkdebug config file: No such file or directory"
    );
    let folder = super::config::read(Path::new("/")).unwrap_err();
    assert_eq!(
        folder.to_string(),
        "Cannot read config file: Is a directory"
    );
}

#[test]
fn limits_that_do_not_go_together_are_refused() {
    type Change = fn(&mut BlkdebugOptions);
    let cases: [(Change, &str); 7] = [
        (|o| o.align = 3, "align 3"),
        (|o| o.align = 1 << 31, "align 2147483648"),
        (|o| o.max_transfer = 0x7fff_ffff, "max-transfer 2147483647"),
        (
            |o| (o.align, o.opt_write_zero) = (4096, 512),
            "opt-write-zero 512",
        ),
        (
            |o| (o.opt_write_zero, o.max_write_zero) = (4096, 1024),
            "max-write-zero 1024",
        ),
        (
            |o| (o.align, o.opt_discard) = (4096, 6144),
            "opt-discard 6144",
        ),
        (
            |o| (o.opt_discard, o.max_discard) = (4096, 1024),
            "max-discard 1024",
        ),
    ];
    for (change, text) in cases {
        let mut options = no_options();
        change(&mut options);
        let error = check_limits(&options, Limits::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("Cannot meet constraints with {text}")
        );
    }
    let mut odd = no_options();
    (odd.max_transfer, odd.opt_discard) = (1, 3);
    assert_eq!(check_limits(&odd, Limits::default()).unwrap(), 512);
}

/// A blkdebug node on a storage, and a raw node on it.
async fn stack(options: BlkdebugOptions) -> (TestStorage, Arc<Node>, Arc<Node>) {
    let storage = TestStorage::new(1 << 20);
    let node_options = NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::default()
    };
    let below = Node::new("below", storage.driver(), node_options);
    let child = Child::new(ChildRole::Image, below);
    let driver = BlkdebugDriver::open(&options, child).await.unwrap();
    let debug = Node::new("debug", Box::new(driver), node_options);
    let raw_options = RawOptions {
        file: BlockdevRef::Name("debug".into()),
        offset: 0,
        size: None,
    };
    let child = Child::new(ChildRole::File, Arc::clone(&debug));
    let raw = RawDriver::new("raw", &raw_options, child).unwrap();
    let raw = Node::new("raw", Box::new(raw), node_options);
    (storage, debug, raw)
}

fn buffer(len: usize) -> IoVec {
    AlignedBuffer::new(len).io_vec(len)
}

#[test]
fn requests_of_a_raw_image_trigger_the_events_of_qemu() {
    EventLoop::new("test").unwrap().block_on(async {
        for (event, op) in [
            ("read_aio", IoOp::Read),
            ("write_aio", IoOp::Write),
            ("pwritev", IoOp::Write),
            ("pwritev_zero", IoOp::WriteZeroes),
            ("flush_to_os", IoOp::Flush),
            ("flush_to_disk", IoOp::Flush),
        ] {
            let mut options = no_options();
            options.inject_error = vec![rule(DebugEvent::from_name(event).unwrap())];
            let (_storage, _debug, raw) = stack(options).await;
            for request in [IoOp::Read, IoOp::Write, IoOp::WriteZeroes, IoOp::Flush] {
                let result = match request {
                    IoOp::Read => raw.read(0, buffer(512)).await,
                    IoOp::Write => raw.write(0, buffer(512), WriteFlags::default()).await,
                    IoOp::WriteZeroes => raw.write_zeroes(0, 512, ZeroFlags::default()).await,
                    _ => raw.flush().await,
                };
                assert_eq!(result.is_err(), request == op, "{event}: {request}");
                if result.is_err() {
                    // The rule stays active, so what comes later would fail too.
                    break;
                }
            }
        }
    });
}

#[test]
fn a_write_that_ended_triggers_what_the_next_request_meets() {
    EventLoop::new("test").unwrap().block_on(async {
        let mut options = no_options();
        options.inject_error = vec![InjectError {
            errno: libc::ENOSPC,
            immediately: false,
            ..rule(DebugEvent::PWRITEV_DONE)
        }];
        let (storage, _debug, raw) = stack(options).await;
        raw.write(0, buffer(512), WriteFlags::default())
            .await
            .unwrap();
        let error = raw.read(0, buffer(512)).await.unwrap_err();
        assert_eq!((error.errno, error.op), (libc::ENOSPC, IoOp::Read));
        assert_eq!(storage.ended().len(), 1);
    });
}

#[test]
fn a_delayed_request_waits_and_then_goes_on_or_fails() {
    EventLoop::new("test").unwrap().block_on(async {
        let delay = Duration::from_millis(3);
        let mut options = no_options();
        options.inject_error = vec![
            InjectError {
                op: Some(IoOp::Read),
                errno: 0,
                delay,
                ..rule(DebugEvent::NONE)
            },
            InjectError {
                op: Some(IoOp::Flush),
                delay,
                once: true,
                ..rule(DebugEvent::NONE)
            },
        ];
        let (_storage, debug, _raw) = stack(options).await;
        let began = std::time::Instant::now();
        debug.read(0, buffer(512)).await.unwrap();
        assert!(began.elapsed() >= delay);
        assert!(debug.flush().await.is_err());
        assert!(began.elapsed() >= delay * 2);
        debug.flush().await.unwrap();
    });
}

#[test]
fn zeroes_smaller_than_the_best_unit_of_the_node_below_are_zeroes_to_the_rules() {
    EventLoop::new("test").unwrap().block_on(async {
        let mut options = no_options();
        options.inject_error.push(InjectError {
            op: Some(IoOp::WriteZeroes),
            errno: libc::ENOSPC,
            ..rule(DebugEvent::NONE)
        });
        let (storage, debug, _raw) = stack(options).await;
        let zeroes = debug.write_zeroes(512, 512, ZeroFlags::default()).await;
        assert_eq!(zeroes.unwrap_err().errno, libc::ENOSPC);
        assert_eq!(storage.ended(), []);
    });
}

#[test]
fn zeroes_and_discards_go_out_in_the_sizes_that_were_asked_for() {
    EventLoop::new("test").unwrap().block_on(async {
        let mut options = no_options();
        options.max_transfer = 1024;
        options.opt_write_zero = 4096;
        options.max_write_zero = 8192;
        options.opt_discard = 4096;
        options.max_discard = 4096;
        let (storage, debug, _raw) = stack(options).await;
        let requests = |ended: Vec<Ended>| -> Vec<(IoOp, u64, u64)> {
            ended.iter().map(|e| (e.op, e.offset, e.len)).collect()
        };
        debug
            .write_zeroes(512, 4096 * 4, ZeroFlags::default())
            .await
            .unwrap();
        assert_eq!(
            requests(storage.ended()),
            [
                (IoOp::Write, 512, 3584),
                (IoOp::WriteZeroes, 4096, 8192),
                (IoOp::WriteZeroes, 12288, 4096),
                (IoOp::Write, 16384, 512),
            ]
        );
        storage.forget_ended();
        debug
            .write_zeroes(512, 1024, ZeroFlags::default())
            .await
            .unwrap();
        assert_eq!(requests(storage.ended()), [(IoOp::Write, 512, 1024)]);
        storage.forget_ended();
        debug.discard(512, 4096 * 3).await.unwrap();
        debug.discard(512, 1024).await.unwrap();
        assert_eq!(
            requests(storage.ended()),
            [(IoOp::Discard, 4096, 4096), (IoOp::Discard, 8192, 4096)]
        );
        storage.forget_ended();
        debug
            .write(0, buffer(2048), WriteFlags::default())
            .await
            .unwrap();
        assert_eq!(
            requests(storage.ended()),
            [(IoOp::Write, 0, 1024), (IoOp::Write, 1024, 1024)]
        );
    });
}

//! Connections that are lost and made again.

use std::os::unix::net::UnixListener;
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use futures_util::future::{FutureExt, join_all};
use futures_util::poll;

use super::super::link::Client;
use super::super::queue::{Command, Status};
use super::super::test_server::{Offer, TestServer};
use crate::buffer::AlignedBuffer;
use crate::driver::CancelReach;
use crate::nbd::protocol::{command, transmission_flag};
use crate::options::{NbdOptions, SocketAddress};
use crate::runtime::{EventLoop, unblock};

const LONG: Duration = Duration::from_secs(3600);

fn write(offset: u64, byte: u8) -> Command {
    let iov = AlignedBuffer::new(512).io_vec(512);
    iov.fill(byte);
    Command {
        kind: command::WRITE,
        flags: 0,
        offset,
        len: 512,
        iov: Some(iov),
        _range: None,
    }
}

fn waiting(server: &TestServer, delay: Duration) -> NbdOptions {
    NbdOptions {
        reconnect_delay: delay,
        ..server.options()
    }
}

/// Runs `test` with a client of a fresh server.
fn with_client<F: Future<Output = ()>>(
    delay: Duration,
    test: impl FnOnce(Arc<TestServer>, Client) -> F,
) {
    let server = Arc::new(TestServer::new(Offer::default()));
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let client = Client::open("n", &waiting(&server, delay)).await.unwrap();
        test(server, client).await;
    });
}

#[test]
fn requests_in_flight_and_new_ones_are_done_by_the_server_that_returns() {
    with_client(LONG, |server, client| async move {
        server.hold(true);
        let first = [1, 2, 3].map(|i| client.request(write(i * 512, i as u8)).boxed_local());
        let mut first = pin!(join_all(first));
        assert!(poll!(&mut first).is_pending());
        let held = Arc::clone(&server);
        unblock(move || held.wait_held(1)).await;
        server.stop();
        let mut late = pin!(client.request(write(4 * 512, 4)));
        assert!(poll!(&mut late).is_pending());
        server.hold(false);
        server.start();
        assert_eq!(first.await, [Ok(None); 3]);
        assert_eq!(late.await, Ok(None));
        for i in 1..=4 {
            assert_eq!(server.disk(|disk| disk[i * 512]), i as u8);
        }
    });
}

#[test]
fn without_a_delay_requests_fail_at_once_and_the_server_is_found_again() {
    with_client(Duration::ZERO, |server, client| async move {
        server.hold(true);
        let mut request = pin!(client.request(write(0, 1)));
        assert!(poll!(&mut request).is_pending());
        let held = Arc::clone(&server);
        unblock(move || held.wait_held(1)).await;
        server.stop();
        assert_eq!(request.await, Err(libc::EIO));
        assert_eq!(client.request(write(0, 2)).await, Err(libc::EIO));
        server.hold(false);
        server.start();
        // Requests are refused until the connection is there.
        let mut result = client.request(write(0, 3)).await;
        while result == Err(libc::EIO) {
            crate::runtime::sleep(Duration::from_millis(5)).await;
            result = client.request(write(0, 3)).await;
        }
        assert_eq!(result, Ok(None));
        assert_eq!(server.disk(|disk| disk[0]), 3);
    });
}

#[test]
fn requests_fail_when_the_server_stays_away_for_too_long() {
    let delay = Duration::from_millis(300);
    with_client(delay, |server, client| async move {
        server.stop();
        let start = Instant::now();
        // The first one may meet the end of the connection before it is noticed.
        assert_eq!(client.request(write(0, 1)).await, Err(libc::EIO));
        assert!(start.elapsed() >= delay / 2);
        assert_eq!(client.request(write(0, 1)).await, Err(libc::EIO));
    });
}

#[test]
fn a_cancel_fails_those_who_wait_for_the_server_and_no_others() {
    with_client(LONG, |server, client| async move {
        // Nobody waits: nothing happens.
        client.cancel(CancelReach::Waiting);
        assert_eq!(client.request(write(0, 1)).await, Ok(None));
        server.hold(true);
        let mut request = pin!(client.request(write(0, 2)));
        assert!(poll!(&mut request).is_pending());
        let held = Arc::clone(&server);
        unblock(move || held.wait_held(1)).await;
        client.cancel(CancelReach::Waiting);
        assert!(poll!(&mut request).is_pending());
        let mut late = pin!(client.request(write(512, 2)));
        assert!(poll!(&mut late).is_pending());
        server.stop();
        // In flight when it was cancelled; the other came later and waits.
        assert_eq!(request.await, Err(libc::EIO));
        assert!(poll!(&mut late).is_pending());
        client.cancel(CancelReach::Waiting);
        assert_eq!(late.await, Err(libc::EIO));
        // Until it has returned, others fail too.
        assert_eq!(client.request(write(0, 2)).await, Err(libc::EIO));
    });
}

#[test]
fn a_silent_server_is_left_when_nobody_wants_its_answers() {
    with_client(LONG, |server, client| async move {
        server.hold(true);
        let mut request = pin!(client.request(write(0, 1)));
        assert!(poll!(&mut request).is_pending());
        let held = Arc::clone(&server);
        unblock(move || held.wait_held(1)).await;
        client.cancel(CancelReach::Hanging);
        let mut late = pin!(client.request(write(512, 2)));
        assert!(poll!(&mut late).is_pending());
        assert_eq!(request.await, Err(libc::EIO));
        // Those that came later are done by the next connection.
        assert!(poll!(&mut late).is_pending());
        server.hold(false);
        assert_eq!(late.await, Ok(None));
        assert_eq!(server.disk(|disk| disk[512]), 2);
    });
}

#[test]
fn a_request_that_ends_each_connection_fails_in_time_and_no_connection_follows_at_once() {
    let delay = Duration::from_millis(700);
    with_client(delay, |server, client| async move {
        server.hang_up(true);
        assert_eq!(client.request(write(0, 1)).await, Err(libc::EIO));
        // One at the beginning, then after 0.1, 0.3, 0.7, 1.5 s.
        assert!(server.accepted() <= 5, "{} connections", server.accepted());
        server.hang_up(false);
        while client.request(write(0, 2)).await != Ok(None) {
            crate::runtime::sleep(Duration::from_millis(5)).await;
        }
    });
}

#[test]
fn what_comes_back_without_block_status_may_all_be_data() {
    let status = || Command {
        kind: command::BLOCK_STATUS,
        flags: 0,
        offset: 0,
        len: 4096,
        iov: None,
        _range: None,
    };
    with_client(LONG, |server, client| async move {
        let hole = Status {
            len: 4096,
            flags: 3,
        };
        assert_eq!(client.request(status()).await, Ok(Some(hole)));
        server.offer(|offer| offer.allocation = false);
        server.cut();
        let data = Status {
            len: 4096,
            flags: 0,
        };
        // The first one may be answered before the end is noticed.
        let mut found = client.request(status()).await;
        while found == Ok(Some(hole)) {
            found = client.request(status()).await;
        }
        assert_eq!(found, Ok(Some(data)));
    });
}

#[test]
fn an_export_that_comes_back_smaller_is_not_written() {
    with_client(Duration::from_millis(500), |server, client| async move {
        server.offer(|offer| offer.size /= 2);
        server.cut();
        assert_eq!(client.request(write(0, 1)).await, Err(libc::EIO));
        server.offer(|offer| offer.size *= 2);
        server.offer(|offer| offer.flags |= transmission_flag::READ_ONLY);
        let accepted = Arc::clone(&server);
        unblock(move || accepted.wait_accepted(3)).await;
        assert_eq!(client.request(write(0, 1)).await, Err(libc::EIO));
        assert_eq!(server.disk(|disk| disk[0]), 0);
    });
}

#[test]
fn a_close_waits_for_the_last_answers_and_takes_leave() {
    with_client(LONG, |server, client| async move {
        let client = Arc::new(client);
        server.hold(true);
        let mut request = pin!(client.request(write(0, 1)));
        assert!(poll!(&mut request).is_pending());
        let (held, closing) = (Arc::clone(&server), Arc::clone(&client));
        unblock(move || held.wait_held(1)).await;
        let closed = unblock(move || closing.close()).fuse();
        let mut closed = pin!(closed);
        assert!(poll!(&mut closed).is_pending());
        server.hold(false);
        closed.await;
        assert_eq!(request.await, Ok(None));
        server.wait_log(|log| log.last().is_some_and(|last| last.0 == command::DISC));
        assert_eq!(client.request(write(0, 1)).await, Err(libc::EIO));
    });
}

#[test]
fn a_close_does_not_wait_for_a_server_that_has_gone() {
    with_client(LONG, |server, client| async move {
        server.stop();
        let client = Arc::new(client);
        let closing = Arc::clone(&client);
        unblock(move || closing.close()).await;
        assert_eq!(client.request(write(0, 1)).await, Err(libc::EIO));
    });
}

#[test]
fn a_server_that_only_listens_is_left_after_the_open_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (sender, accepted) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        // Kept, so that nothing is heard of it.
        let _ = sender.send(listener.accept().map(|(stream, _)| stream));
    });
    let options = NbdOptions {
        server: SocketAddress::Unix {
            path,
            is_abstract: false,
            tight: true,
        },
        export: "e".to_owned(),
        dirty_bitmap: None,
        reconnect_delay: Duration::ZERO,
        open_timeout: Duration::from_secs(1),
    };
    let event_loop = EventLoop::new("test").unwrap();
    let error = event_loop
        .block_on(Client::open("n", &options))
        .err()
        .unwrap();
    assert!(
        error
            .to_string()
            .contains("did not offer export 'e' within")
    );
    thread.join().unwrap();
    drop(accepted);
}

#[test]
fn a_server_that_starts_late_is_found_within_the_open_timeout() {
    let server = TestServer::new(Offer::default());
    server.stop();
    let options = NbdOptions {
        open_timeout: LONG,
        ..server.options()
    };
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let mut open = pin!(Client::open("n", &options));
        assert!(poll!(&mut open).is_pending());
        server.start();
        assert!(open.await.is_ok());
    });
}

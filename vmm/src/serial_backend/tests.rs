use std::io::Read;
use std::os::unix::net::UnixStream;

use super::*;

#[test]
fn output_reaches_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let backend = SerialBackend::open(&SerialSpec::File(file.path().to_owned())).unwrap();
    let mut sink = backend.sink();
    for _ in 0..10_000 {
        sink.write_all(b"0123456789").unwrap();
    }
    backend.flush(Duration::from_secs(60));
    assert_eq!(file.as_file().metadata().unwrap().len(), 100_000);
}

#[test]
fn a_reader_that_stops_holds_the_guest_once_and_loses_output_then() {
    struct Stuck;
    impl Place for Stuck {
        fn put(&mut self, _: &[u8]) {
            loop {
                thread::park();
            }
        }
    }
    let queue = Arc::new(OutputQueue::default());
    let writer = Arc::clone(&queue);
    thread::spawn(move || writer.write_out(Box::new(Stuck)));
    let mut lost = 0;
    for _ in 0..3 * QUEUE_CAPACITY {
        lost += usize::from(queue.push(b"x").is_err());
    }
    // Not more than the queue and what the writer took at once is kept; had
    // every byte waited, this test would take a day.
    assert!(lost >= QUEUE_CAPACITY, "{lost}");
}

/// Reads a byte from the port as a guest does, when there is one.
fn guest_read(serial: &Serial) -> u8 {
    loop {
        let mut status = [0];
        devices::PioDevice::read(serial, 5, &mut status);
        if status[0] & 1 != 0 {
            let mut byte = [0];
            devices::PioDevice::read(serial, 0, &mut byte);
            return byte[0];
        }
        thread::yield_now();
    }
}

/// A port on a socket in a folder.
fn on_socket(folder: &Path) -> (PathBuf, SerialBackend, Arc<Serial>) {
    let path = folder.join("serial");
    let mut backend = SerialBackend::open(&SerialSpec::Unix(path.clone())).unwrap();
    let serial = Arc::new(Serial::new(backend.sink()).unwrap());
    backend.start_input(Arc::clone(&serial), || {}).unwrap();
    (path, backend, serial)
}

#[test]
fn a_client_of_the_socket_gets_output_and_the_next_can_come() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _backend, serial) = on_socket(dir.path());
    for _ in 0..2 {
        let mut client = UnixStream::connect(&path).unwrap();
        // Input proves that the client has been accepted.
        client.write_all(b"hi").unwrap();
        assert_eq!([guest_read(&serial), guest_read(&serial)], *b"hi");
        devices::PioDevice::write(&*serial, 0, b"!");
        let mut answer = [0];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"!");
    }
}

#[test]
fn a_client_that_only_listens_gets_output() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _backend, serial) = on_socket(dir.path());
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest_read(&serial), b'x');
    // The end of its input is seen before the next byte of another client
    // would be: by now, or while these are written.
    let mut answer = [0];
    for _ in 0..100 {
        devices::PioDevice::write(&*serial, 0, b"!");
        client.read_exact(&mut answer).unwrap();
    }
}

#[test]
fn a_client_that_leaves_unread_input_does_not_keep_the_next_out() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _backend, serial) = on_socket(dir.path());
    let mut first = UnixStream::connect(&path).unwrap();
    first.write_all(&[b'1'; 2 * input::CAPACITY]).unwrap();
    drop(first);
    // Nobody has read a byte for the guest.
    let mut next = UnixStream::connect(&path).unwrap();
    next.set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let mut answer = [0];
    for tries in 0.. {
        devices::PioDevice::write(&*serial, 0, b"!");
        if next.read_exact(&mut answer).is_ok() {
            break;
        }
        assert!(tries < 1000, "never accepted");
    }
    assert_eq!(guest_read(&serial), b'1');
}

#[test]
fn a_write_that_fails_late_does_not_throw_the_next_client_out() {
    let dir = tempfile::tempdir().unwrap();
    let place = SocketPlace::bind(&dir.path().join("serial")).unwrap();
    let (old, _) = UnixStream::pair().unwrap();
    let (next, _peer) = UnixStream::pair().unwrap();
    let next = Arc::new(next);
    *place.client() = Some(Arc::clone(&next));
    place.hang_up(&Arc::new(old));
    assert!(
        place
            .client()
            .as_ref()
            .is_some_and(|client| Arc::ptr_eq(client, &next))
    );
}

#[test]
fn a_fifo_is_refused_without_a_reader_and_written_with_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let error = SerialBackend::open(&SerialSpec::File(path.clone()))
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("FIFO that nobody reads"),
        "{error}"
    );
    let mut reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    let backend = SerialBackend::open(&SerialSpec::File(path)).unwrap();
    backend.sink().write_all(b"hello").unwrap();
    backend.flush(Duration::from_secs(60));
    let mut got = [0; 5];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
}

//! Image locks against QEMU's own programs.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};

use super::*;

/// As a guest's disk without sharing.
const DISK: Permissions = Permissions {
    need: Perm::CONSISTENT_READ,
    share: Perm::CONSISTENT_READ,
};

fn writer() -> Permissions {
    Permissions {
        need: DISK.need | Perm::WRITE,
        ..DISK
    }
}

fn take(driver: &FileDriver, permissions: Permissions) -> Result<(), PermissionError> {
    driver.check_permissions(permissions)?;
    driver.set_permissions();
    Ok(())
}

/// `None` if it is not installed.
fn qemu(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(_) => {
            eprintln!("skipped: {program} is not installed");
            None
        }
    }
}

#[test]
fn qemu_io_is_kept_out_while_we_write() {
    let image = image_in(&disk(), 1 << 20);
    let path = image.path().to_str().unwrap();
    let write = || qemu("qemu-io", &["-f", "raw", "-c", "write -P 7 0 4096", path]);
    let target = image_in(&disk(), 0);
    let target = target.path().to_str().unwrap();
    let read = || {
        let args = ["convert", "-f", "raw", "-O", "raw", path, target];
        qemu("qemu-img", &args)
    };
    let driver = open_image(image.path(), false);
    // Open alone is in nobody's way.
    let Some(output) = write() else { return };
    assert!(output.status.success(), "{output:?}");
    take(&driver, writer()).unwrap();
    let output = write().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("Failed to get \"write\" lock"), "{text}");
    // A reader, too, since it does not share writing.
    let output = read().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("Failed to get shared \"write\" lock"),
        "{text}"
    );
    // Lowered, readers may come; given up, all may.
    take(&driver, DISK).unwrap();
    let output = read().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(!write().unwrap().status.success());
    take(&driver, Permissions::IDLE).unwrap();
    assert!(write().unwrap().status.success());
    // Closed, too.
    take(&driver, writer()).unwrap();
    driver.close();
    assert!(write().unwrap().status.success());
}

/// A QEMU program that has the image open until this is dropped.
struct Holder {
    child: Child,
}

impl Holder {
    /// Starts it, and waits until it has locked byte `offset`. `None` if it is
    /// not installed.
    fn start(program: &str, args: &[&str], watcher: &FileDriver, offset: i64) -> Option<Self> {
        let spawned = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let Ok(child) = spawned else {
            eprintln!("skipped: {program} is not installed");
            return None;
        };
        let mut holder = Self { child };
        let started = std::time::Instant::now();
        while !sys::byte_is_locked(&watcher.file, offset).unwrap() {
            let ended = holder.child.try_wait().unwrap();
            assert!(ended.is_none(), "{program} ended: {ended:?}");
            assert!(started.elapsed().as_secs() < 60, "{program} takes no lock");
            std::thread::yield_now();
        }
        Some(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn we_are_kept_out_while_qemu_writes() {
    let image = image_in(&disk(), 1 << 20);
    let driver = open_image(image.path(), false);
    let path = image.path().to_str().unwrap();
    // Writes, and lets others write.
    let Some(holder) = Holder::start("qemu-io", &["-f", "raw", path], &driver, 101) else {
        return;
    };
    let error = take(&driver, DISK).unwrap_err();
    assert_eq!(error.to_string(), "Failed to get shared \"write\" lock");
    assert_eq!(
        error.hint().unwrap(),
        format!("Is another process using the image [{path}]?")
    );
    assert!(take(&driver, writer()).is_err());
    drop(holder);
    take(&driver, writer()).unwrap();
}

#[test]
fn we_may_read_but_not_write_while_qemu_img_reads() {
    let image = image_in(&disk(), 0);
    std::fs::write(image.path(), vec![1; 16 << 20]).unwrap();
    let target = image_in(&disk(), 0);
    let driver = open_image(image.path(), false);
    // Reads for hours, and does not let others write.
    let args = [
        "convert",
        "-r",
        "1024",
        "-f",
        "raw",
        "-O",
        "raw",
        image.path().to_str().unwrap(),
        target.path().to_str().unwrap(),
    ];
    let Some(holder) = Holder::start("qemu-img", &args, &driver, 201) else {
        return;
    };
    let error = take(&driver, writer()).unwrap_err();
    assert_eq!(error.to_string(), "Failed to get \"write\" lock");
    take(&driver, DISK).unwrap();
    drop(holder);
    take(&driver, writer()).unwrap();
}

#[test]
fn the_storage_daemon_and_we_exclude_each_other() {
    let image = image_in(&disk(), 1 << 20);
    let dir = tempfile::tempdir().unwrap();
    let blockdev = format!(
        "driver=file,node-name=f,filename={}",
        image.path().display()
    );
    let socket = format!("addr.type=unix,addr.path={}/nbd", dir.path().display());
    let export = || {
        Command::new("qemu-storage-daemon")
            .args(["--blockdev", &blockdev, "--nbd-server", &socket])
            .args(["--export", "nbd,id=e,node-name=f,writable=on"])
            .args(["--chardev", "stdio,id=c", "--monitor", "chardev=c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    let driver = open_image(image.path(), false);
    take(&driver, writer()).unwrap();
    let Ok(refused) = export() else {
        eprintln!("skipped: qemu-storage-daemon is not installed");
        return;
    };
    let output = refused.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(text.contains("Failed to get \"write\" lock"), "{text}");
    take(&driver, Permissions::IDLE).unwrap();

    let mut daemon = export().unwrap();
    let mut greeting = String::new();
    BufReader::new(daemon.stdout.as_mut().unwrap())
        .read_line(&mut greeting)
        .unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
    // A writable export shares everything; but who does not share is refused.
    let error = take(&driver, writer()).unwrap_err();
    assert!(matches!(error, PermissionError::Locked { .. }));
    let stdin = daemon.stdin.as_mut().unwrap();
    writeln!(stdin, "{{\"execute\":\"qmp_capabilities\"}}").unwrap();
    writeln!(stdin, "{{\"execute\":\"quit\"}}").unwrap();
    daemon.wait_with_output().unwrap();
    take(&driver, writer()).unwrap();
}

#[test]
fn locking_off_ignores_others_and_is_ignored() {
    let image = image_in(&disk(), 1 << 20);
    let with_lock = open_image(image.path(), false);
    take(&with_lock, writer()).unwrap();
    let options = FileOptions {
        locking: Some(false),
        ..file_options(image.path())
    };
    let without = open("other", &options, OpenFlags::default()).unwrap();
    take(&without, writer()).unwrap();
    // Two nodes of one process are as two processes.
    let second = open_image(image.path(), false);
    assert!(take(&second, writer()).is_err());
}

#[test]
fn the_lock_lasts_until_the_last_request_has_ended() {
    let image = image_in(&disk(), 1 << 20);
    let driver = open_image(image.path(), false);
    let other = open_image(image.path(), false);
    take(&driver, writer()).unwrap();
    // As an operation in the ring that nobody waits for has it.
    let in_flight = Arc::clone(&driver.file);
    driver.close();
    assert!(take(&other, writer()).is_err());
    drop(driver);
    assert!(take(&other, writer()).is_err());
    drop(in_flight);
    take(&other, writer()).unwrap();
}

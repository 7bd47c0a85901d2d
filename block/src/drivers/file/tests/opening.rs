//! What can be opened, how, and what is said if not.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use super::*;

fn refused(path: &Path, flags: OpenFlags) -> String {
    match open("node", &file_options(path), flags) {
        Ok(_) => panic!("{path:?} was opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_no_image_is_refused_by_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let shown = |name: &str| path(name).display().to_string();
    assert_eq!(
        refused(&path("none"), OpenFlags::default()),
        format!(
            "Could not open '{}': No such file or directory",
            shown("none")
        )
    );
    std::fs::create_dir(path("dir")).unwrap();
    assert_eq!(
        refused(&path("dir"), OpenFlags::default()),
        format!("Could not open '{}': Is a directory", shown("dir"))
    );
    let kind = |path: &Path| {
        format!(
            "'file' driver requires '{}' to be a regular file",
            path.display()
        )
    };
    let reading = OpenFlags {
        read_only: true,
        ..OpenFlags::default()
    };
    assert_eq!(refused(&path("dir"), reading), kind(&path("dir")));
    let fifo = std::ffi::CString::new(shown("fifo")).unwrap();
    // SAFETY: the path ends in NUL.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let _socket = UnixListener::bind(path("socket")).unwrap();
    for path in [path("fifo"), path("socket"), "/dev/null".into()] {
        assert_eq!(refused(&path, OpenFlags::default()), kind(&path));
    }
    let error = open(
        "node",
        &FileOptions {
            host_device: true,
            bitmap_file: None,
            ..file_options(&image_in(dir.path(), 512).into_temp_path().keep().unwrap())
        },
        OpenFlags::default(),
    )
    .err()
    .unwrap();
    assert!(matches!(error, OpenError::NotADevice { .. }));
}

#[test]
fn an_empty_file_is_an_image_of_no_bytes() {
    for place in places() {
        for direct in [false, true] {
            let image = image_in(&place, 0);
            assert_eq!(open_image(image.path(), direct).size(), 0);
        }
    }
}

#[test]
fn auto_read_only_falls_back_where_writing_is_not_allowed() {
    // A file that even root cannot write: the executable that runs.
    let busy = std::env::current_exe().unwrap();
    let error = refused(&busy, OpenFlags::default());
    assert!(error.ends_with("Text file busy"), "{error}");
    // Not a matter of rights, so there is no fallback.
    let auto = OpenFlags {
        auto_read_only: true,
        ..OpenFlags::default()
    };
    assert!(refused(&busy, auto).ends_with("Text file busy"));

    let image = image_in(&disk(), 4096);
    let driver = open("node", &file_options(image.path()), auto).unwrap();
    assert!(!driver.read_only());
    std::fs::set_permissions(image.path(), std::fs::Permissions::from_mode(0o400)).unwrap();
    // Root may write it all the same; then a read-only mount would be needed.
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        assert!(refused(image.path(), OpenFlags::default()).ends_with("Permission denied"));
        let driver = open("node", &file_options(image.path()), auto).unwrap();
        assert!(driver.read_only());
    }
}

#[test]
fn a_read_only_node_gives_no_write_permission() {
    let image = image_in(&disk(), 4096);
    let driver = open(
        "node",
        &file_options(image.path()),
        OpenFlags {
            read_only: true,
            ..OpenFlags::default()
        },
    )
    .unwrap();
    assert!(driver.read_only());
    let error = driver
        .check_permissions(Permissions {
            need: Perm::WRITE,
            share: Perm::ALL,
        })
        .unwrap_err();
    assert_eq!(error.to_string(), "Block node is read-only");
    driver
        .check_permissions(Permissions {
            need: Perm::CONSISTENT_READ,
            share: !Perm::RESIZE,
        })
        .unwrap();
    driver.set_permissions();
}

#[test]
fn alignment_found_by_trying_agrees_with_what_the_kernel_says() {
    // Not a hole, which some file systems read at any alignment.
    let image = image_in(&disk(), 0);
    std::fs::write(image.path(), vec![1; 1 << 20]).unwrap();
    image.as_file().sync_all().unwrap();
    let driver = open_image(image.path(), true);
    let told = driver.direct.unwrap();
    let tried = open::try_alignment(&driver.file, SECTOR, 1 << 20).unwrap();
    assert!(tried.request >= 512 && tried.request <= told.request);
    assert!(tried.memory.is_power_of_two() && tried.memory <= 4096);
}

#[test]
fn a_read_that_nobody_checks_proves_no_alignment() {
    // Opened without O_DIRECT, so that any read is accepted.
    let image = image_in(&disk(), 1 << 20);
    for (size, request) in [(1 << 20, 4096), (5 * 512, 512), (0, 4096)] {
        let tried = open::try_alignment(image.as_file(), SECTOR, size).unwrap();
        let safe = DirectAlignment {
            memory: 4096,
            request,
        };
        assert_eq!(tried, safe, "{size}");
    }
}

#[test]
fn an_odd_size_is_refused_where_blocks_could_not_be_written() {
    let image = image_in(&disk(), 5 * 512);
    let opened = |read_only| Opened {
        file: std::fs::File::open(image.path()).unwrap(),
        kind: Kind::Regular,
        read_only,
        size: 5 * 512,
        direct: Some(DirectAlignment {
            memory: 4096,
            request: 4096,
        }),
    };
    let options = file_options(image.path());
    let error = FileDriver::new("node", &options, flags(true), opened(false)).err();
    assert!(error.unwrap().to_string().contains("block size"));
    assert!(FileDriver::new("node", &options, flags(true), opened(true)).is_ok());
}

use super::*;

fn entry(point: u64, parent: Option<u64>) -> Entry {
    let kind = if parent.is_some() {
        Kind::Incremental
    } else {
        Kind::Full
    };
    Entry {
        point,
        kind,
        parent,
        time: 0,
        size: 1 << 20,
        file: format!("d.{point}.{}.raw", kind.name()),
        sha256: "0".repeat(64),
        data_bytes: 0,
        ranges: parent.map(|_| RangesFile {
            file: format!("d.{point}.ranges"),
            sha256: "f".repeat(64),
            count: 0,
            bytes: 0,
        }),
        bitmap: "b".to_owned(),
        bitmap_persistent: false,
        job: JobResult {
            id: "j".to_owned(),
            result: "completed".to_owned(),
            bytes: 0,
            milliseconds: 0,
        },
    }
}

fn manifest(entries: Vec<Entry>) -> Manifest {
    let mut manifest = Manifest::new("1a2b".to_owned());
    for entry in entries {
        manifest.add("d", "d", entry);
    }
    manifest
}

#[test]
fn a_manifest_is_read_as_it_was_written() {
    let written = manifest(vec![entry(1, None), entry(2, Some(1)), entry(5, Some(2))]);
    let read = Manifest::parse(written.to_text().as_bytes()).unwrap();
    assert_eq!(read, written);
    assert_eq!(read.last_point(), 5);
}

#[test]
fn a_chain_leads_from_the_full_one_to_the_point() {
    let all = manifest(vec![
        entry(1, None),
        entry(2, Some(1)),
        entry(4, None),
        entry(5, Some(4)),
        entry(7, Some(5)),
    ]);
    let disk = all.disk("d").unwrap();
    let points = |point| {
        let chain = disk.chain(point)?;
        Some(chain.iter().map(|entry| entry.point).collect::<Vec<_>>())
    };
    assert_eq!(points(None), Some(vec![4, 5, 7]));
    assert_eq!(points(Some(6)), Some(vec![4, 5]));
    assert_eq!(points(Some(3)), Some(vec![1, 2]));
    assert_eq!(points(Some(0)), None);
}

#[test]
fn what_leads_out_of_the_directory_or_makes_no_sense_is_refused() {
    type Change = fn(&mut Entry);
    let changes: &[Change] = &[
        |it| it.file = "../x".to_owned(),
        |it| it.file = "/etc/passwd".to_owned(),
        |it| it.file = ".".to_owned(),
        |it| it.file = "..".to_owned(),
        |it| it.file = String::new(),
        |it| it.file = ".hidden".to_owned(),
        |it| it.file = "a\u{0}b".to_owned(),
        |it| it.file = "x".repeat(256),
        |it| it.file = NAME.to_owned(),
        |it| it.file = "d.1.full.raw".to_owned(),
        |it| it.size = u64::MAX,
        |it| it.sha256 = "0".repeat(63),
        |it| it.sha256 = "G".repeat(64),
        |it| it.point = 0,
        |it| it.point = 1,
        |it| it.point = u64::MAX,
        |it| it.parent = Some(2),
        |it| it.parent = Some(7),
        |it| it.parent = None,
        |it| it.ranges = None,
        |it| it.kind = Kind::Full,
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut second = entry(2, Some(1));
        change(&mut second);
        let text = manifest(vec![entry(1, None), second]).to_text();
        let error = Manifest::parse(text.as_bytes());
        assert!(error.is_err(), "{number}: {error:?}");
    }
    for text in [
        "",
        "{}",
        "[]",
        "null",
        "{\"format\":\"diptych-backup\"}",
        "\u{0}",
    ] {
        assert!(Manifest::parse(text.as_bytes()).is_err(), "{text}");
    }
    let text = manifest(Vec::new()).to_text();
    for (from, to) in [
        ("diptych-backup", "other"),
        ("\"version\": 1", "\"version\": 2"),
        ("1a2b", "../.."),
    ] {
        let text = text.replace(from, to);
        assert!(Manifest::parse(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn another_version_is_told_by_its_number_whatever_else_it_has() {
    let text = r#"{"format": "diptych-backup", "version": 2, "disks": {}}"#;
    let error = Manifest::parse(text.as_bytes()).unwrap_err();
    assert_eq!(error, "its version is 2, this program knows 1");
}

#[test]
fn no_more_is_noted_than_can_be_read() {
    let mut all = manifest(vec![entry(1, None)]);
    assert_eq!(all.check_room(["d", "e"].into_iter()), Ok(()));
    let long = "x".repeat(MAX_DISK_NAME + 1);
    assert!(all.check_room([long.as_str()].into_iter()).is_err());
    for number in 1..MAX_DISKS {
        all.add(&format!("d{number}"), "s", entry(1, None));
    }
    assert_eq!(all.check_room(["d"].into_iter()), Ok(()));
    assert!(all.check_room(["e"].into_iter()).is_err());
    let most = u64::try_from(MAX_ENTRIES).unwrap();
    let entries = (1..=most).map(|point| entry(point, (point > 1).then(|| point - 1)));
    let mut full = manifest(Vec::new());
    full.disks.push(Disk {
        name: "d".to_owned(),
        stem: "d".to_owned(),
        entries: entries.collect(),
    });
    assert!(full.check_room(["d"].into_iter()).is_err());
    assert!(
        full.check_room(["e"].into_iter()).is_err(),
        "its text is too long by then"
    );
}

#[test]
fn a_long_chain_is_looked_through_once() {
    // Looking for each parent from the beginning is 5e9 steps.
    let most = u64::try_from(MAX_ENTRIES).unwrap();
    let entries = (1..=most).map(|point| entry(point, (point > 1).then(|| point - 1)));
    let mut all = manifest(Vec::new());
    all.disks.push(Disk {
        name: "d".to_owned(),
        stem: "d".to_owned(),
        entries: entries.collect(),
    });
    assert_eq!(all.check(), Ok(()));
    let chain = all.disk("d").and_then(|disk| disk.chain(None)).unwrap();
    assert_eq!(chain.len(), MAX_ENTRIES);
}

#[test]
fn disks_have_files_of_their_own() {
    let mut all = manifest(vec![entry(1, None)]);
    assert_eq!(all.stem("d", &[]), "d");
    assert_eq!(all.stem("#block1/x", &[]), "_block1_x");
    all.add("/", "_", entry(1, None));
    assert_eq!(all.stem(":", &[]), "_-2");
    assert_eq!(all.stem(":", &["_-2".to_owned()]), "_-3");
}

#[test]
fn times_are_told_in_utc() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_709_251_199, "2024-02-29T23:59:59Z"),
        (1_795_440_000, "2026-11-23T13:20:00Z"),
    ] {
        assert_eq!(utc(seconds), text);
    }
    utc(u64::MAX);
}

//! Headers, good and hostile.

use crate::drivers::qcow2::header::{Header, HeaderError, cluster_len};

/// A header as QEMU makes it: 64 KiB clusters, 1 MiB.
fn header_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 65536];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &0x30000u64.to_be_bytes());
    put(48, &0x10000u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    bytes
}

const FILE_LEN: u64 = 0x30200;

/// Bytes to be put somewhere.
type Patches<'a> = &'a [(usize, &'a [u8])];

fn parse(patches: Patches<'_>) -> Result<Header, HeaderError> {
    let mut bytes = header_bytes();
    for (at, patch) in patches {
        bytes[*at..at + patch.len()].copy_from_slice(patch);
    }
    let header = Header::parse(&bytes, FILE_LEN)?;
    header.check_features(false)?;
    Ok(header)
}

#[test]
fn a_header_says_where_tables_and_backing_files_are() {
    let header = parse(&[
        (8, &600u64.to_be_bytes()),
        (16, &4u32.to_be_bytes()),
        (600, b"base"),
        (104, &0xe279_2acau32.to_be_bytes()),
        (108, &5u32.to_be_bytes()),
        (112, b"qcow2"),
    ])
    .unwrap();
    assert_eq!(header.backing.as_deref(), Some("base"));
    assert_eq!(header.backing_format.as_deref(), Some("qcow2"));
    assert_eq!((header.l1_offset, header.l1_entries), (0x30000, 1));
    assert_eq!(
        (header.reftable_offset, header.reftable_len),
        (0x10000, 65536)
    );
    assert!(!header.needs_data_file());
}

#[test]
fn numbers_that_make_no_sense_are_refused_before_anything_is_allocated_by_them() {
    use HeaderError as E;
    let max32 = u32::MAX.to_be_bytes();
    let far = (1u64 << 40).to_be_bytes();
    let cases: &[(Patches<'_>, E)] = &[
        (&[(0, b"QFI\0")], E::NotQcow2),
        (&[(4, &9u32.to_be_bytes())], E::Version(9)),
        (&[(20, &8u32.to_be_bytes())], E::ClusterSize(8)),
        (&[(20, &max32)], E::ClusterSize(u32::MAX)),
        (&[(24, &u64::MAX.to_be_bytes())], E::Size(u64::MAX)),
        (&[(24, &far)], E::L1TooSmall),
        (&[(36, &max32)], E::L1TooLarge),
        (&[(36, &0u32.to_be_bytes())], E::L1TooSmall),
        (&[(40, &far)], E::L1Offset),
        (&[(40, &0x30001u64.to_be_bytes())], E::L1Offset),
        (&[(40, &(u64::MAX << 16).to_be_bytes())], E::L1Offset),
        (&[(48, &far)], E::ReftableOffset),
        (&[(48, &[0; 8])], E::ReftableOffset),
        (&[(56, &max32)], E::ReftableTooLarge),
        (&[(56, &[0; 4])], E::NoReftable),
        (&[(60, &max32)], E::Snapshots),
        (&[(96, &7u32.to_be_bytes())], E::RefcountWidth),
        (&[(100, &8u32.to_be_bytes())], E::TooShort),
        (&[(100, &max32)], E::TooLong),
        (&[(104, &[1; 4]), (108, &max32)], E::Extension),
        (
            &[
                (104, &0x6803_f857u32.to_be_bytes()),
                (108, &1u32.to_be_bytes()),
            ],
            E::BadExtension("feature name table is cut off"),
        ),
        (
            &[(8, &u64::MAX.to_be_bytes()), (16, &[0, 0, 0, 9])],
            E::BackingOffset,
        ),
        (&[(8, &600u64.to_be_bytes()), (16, &max32)], E::BackingName),
        (
            &[
                (8, &600u64.to_be_bytes()),
                (16, &[0, 0, 0, 1]),
                (600, &[0xff]),
            ],
            E::NotText("backing file"),
        ),
        (&[(32, &1u32.to_be_bytes())], E::Encrypted(1)),
        (&[(79, &[1])], E::Dirty),
        (&[(79, &[2])], E::Corrupt),
        (&[(79, &[8])], E::Compression),
        (&[(79, &[16])], E::ExtendedL2),
        (&[(72, &[0x80])], E::UnknownFeatures(1 << 63)),
        (&[(95, &[1])], E::Bitmaps),
        (&[(95, &[2])], E::RawDataFile),
    ];
    for (patches, error) in cases {
        assert_eq!(parse(patches).as_ref(), Err(error), "{patches:?}");
    }
    assert_eq!(cluster_len(&[]), Err(E::NotQcow2));
}

#[test]
fn readers_may_have_images_that_writers_may_not() {
    for patch in [(79, 1), (79, 2), (95, 1), (95, 2)] {
        let mut bytes = header_bytes();
        bytes[patch.0] = patch.1;
        let header = Header::parse(&bytes, FILE_LEN).unwrap();
        header.check_features(true).unwrap();
        header.check_features(false).unwrap_err();
    }
    // Nobody knows what an unknown bit of this kind means, so it may be cleared.
    parse(&[(88, &[0x80])]).unwrap();
}

#[test]
fn any_bytes_are_a_header_or_an_error() {
    let mut seed = 1u64;
    for _ in 0..20_000 {
        let mut bytes = header_bytes();
        for _ in 0..4 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            bytes[(seed >> 33) as usize % 128] = (seed >> 24) as u8;
        }
        let _ = Header::parse(&bytes, FILE_LEN).map(|header| header.check_features(false));
    }
}

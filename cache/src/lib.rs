//! Content-addressed blobs, action records and locks, as files; knows no stages.

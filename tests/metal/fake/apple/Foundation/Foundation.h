/* What the Metal host uses of Apple's Foundation, for a syntax check with Apple's target. Declared from its public
 * documentation; the full headers come only with Xcode. */
#ifndef STUB_FOUNDATION_H
#define STUB_FOUNDATION_H
#include <objc/NSObject.h> /* Apple's own, with the Darwin libc headers */
#include <stdint.h>

@interface NSString : NSObject
+ (instancetype)stringWithUTF8String:(const char *)nullTerminatedCString;
- (const char *)UTF8String;
@end

@interface NSError : NSObject
- (NSInteger)code;
- (NSString *)localizedDescription;
@end

@interface NSMutableArray : NSObject
- (NSUInteger)count;
- (id)objectAtIndex:(NSUInteger)index;
- (id)lastObject;
- (void)addObject:(id)anObject;
- (void)removeAllObjects;
@end
#endif
